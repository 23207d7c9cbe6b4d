// A plugin written with libgse. Argument: the data socket. Words on standard input:
//
//	info                  who is the agent, asked by the simple client and by the one that beats use
//	dynamic <id> <text>   a record as beats send it, with an entry in its meta area
//	common <id> <text>    a plain record
//	ops <id> <text>       a record of operations
package main

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/TencentBlueKing/bkmonitor-datalink/pkg/libgse/gse"
)

func fail(what string, err error) {
	fmt.Printf("failed: %s: %v\n", what, err)
	os.Exit(1)
}

func main() {
	client, err := gse.NewGseClientFromConfig(gse.Config{
		Endpoint:       os.Args[1],
		MsgQueueSize:   1,
		WriteTimeout:   5 * time.Second,
		ReadTimeout:    60 * time.Second,
		RetryTimes:     30,
		RetryInterval:  200 * time.Millisecond,
		ReconnectTimes: 30,
	})
	if err != nil {
		fail("client", err)
	}
	if err = client.Start(); err != nil {
		fail("start", err)
	}
	fmt.Println("ready")
	words := bufio.NewScanner(os.Stdin)
	for words.Scan() {
		word := strings.SplitN(words.Text(), " ", 3)
		if word[0] == "info" {
			simple := gse.NewGseSimpleClient()
			simple.SetAgentHost(os.Args[1])
			if err := simple.Start(); err != nil {
				fail("simple client", err)
			}
			one, err := simple.SyncGetAgentInfo()
			if err != nil {
				fail("simple client", err)
			}
			simple.Close()
			var two gse.AgentInfo
			for n := 0; n < 100 && two.IsEmpty(); n++ {
				two, err = client.GetAgentInfo()
				if err != nil {
					fail("client", err)
				}
				time.Sleep(100 * time.Millisecond)
			}
			for _, info := range []gse.AgentInfo{one, two} {
				fmt.Printf("info %d %d %s %s\n", info.Bizid, info.Cloudid, info.IP, info.BKAgentID)
			}
			continue
		}
		id, err := strconv.ParseInt(word[1], 10, 32)
		if err != nil {
			fail(word[0], err)
		}
		data := []byte(word[2])
		switch word[0] {
		case "dynamic":
			message := gse.NewGseDynamicMsg(data, int32(id), 0, 0)
			if err := message.AddMeta("tlogc", "2017-01-09 21:18"); err != nil {
				fail("meta", err)
			}
			err = client.Send(message)
		case "common":
			err = client.Send(gse.NewGseCommonMsg(data, int32(id), 0, 0, 0))
		case "ops":
			err = client.Send(gse.NewGseOpMsg(data, int32(id), 0, 0, 0))
		default:
			err = fmt.Errorf("what is this")
		}
		if err != nil {
			fail(word[0], err)
		}
		fmt.Println("sent")
	}
}
