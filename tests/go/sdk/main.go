// A plugin written with the official SDK. Arguments: the data socket, the message socket. Words on standard input:
//
//	info                 who is the agent, by both sockets
//	report <id> <text>   a record
//	say <id> <text>      a message to the platform
//
// Messages from the platform are printed as they come.
package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	agentmessage "github.com/TencentBlueKing/bk-gse-sdk/go/service/agent-message"
	agentreport "github.com/TencentBlueKing/bk-gse-sdk/go/service/agent-report"
	"github.com/TencentBlueKing/bk-gse-sdk/go/types"
)

func fail(what string, err error) {
	fmt.Printf("failed: %s: %v\n", what, err)
	os.Exit(1)
}

// untilItWorks tries for twenty seconds: after a restart of the agent the SDK connects again by itself.
func untilItWorks(what string, try func() error) {
	var err error
	for n := 0; n < 200; n++ {
		if err = try(); err == nil {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	fail(what, err)
}

func main() {
	ctx := context.Background()
	report, err := agentreport.New(
		agentreport.WithDomainSocketPath(os.Args[1]),
		agentreport.WithLogger(types.NewEmptyLogger()),
	)
	if err != nil {
		fail("agent-report", err)
	}
	if err = report.Launch(ctx); err != nil {
		fail("launch of agent-report", err)
	}
	message, err := agentmessage.New(
		agentmessage.WithPluginName("beat"),
		agentmessage.WithPluginVersion("1.2.3"),
		agentmessage.WithDomainSocketPath(os.Args[2]),
		agentmessage.WithRecvCallback(func(id string, content []byte) {
			fmt.Printf("message %s %s\n", id, content)
		}),
		agentmessage.WithLogger(types.NewEmptyLogger()),
	)
	if err != nil {
		fail("agent-message", err)
	}
	if err = message.Launch(ctx); err != nil {
		fail("launch of agent-message", err)
	}
	fmt.Println("ready")
	words := bufio.NewScanner(os.Stdin)
	for words.Scan() {
		word := strings.SplitN(words.Text(), " ", 3)
		switch word[0] {
		case "info":
			untilItWorks("info", func() error {
				one, err := report.GetAgentInfo()
				if err != nil {
					return err
				}
				if one.AgentID == "" {
					return fmt.Errorf("no answer yet")
				}
				two, err := message.GetAgentInfo()
				if err != nil {
					return err
				}
				fmt.Printf("info %s %d %s %d running=%t proxy=%t\n", one.AgentID, one.CloudID, two.AgentID, two.CloudID,
					two.IsRunning(), two.IsProxy())
				return nil
			})
		case "report":
			id, err := strconv.ParseUint(word[1], 10, 32)
			if err != nil {
				fail("report", err)
			}
			untilItWorks("report", func() error { return report.ReportData(ctx, uint32(id), []byte(word[2])) })
			fmt.Println("reported")
		case "say":
			untilItWorks("say", func() error { return message.SendMessage(ctx, word[1], []byte(word[2])) })
			fmt.Println("said")
		default:
			fmt.Println("failed: what is", word[0])
		}
	}
}
