//! What callers may do.

use proptest::prelude::*;

use super::*;

#[test]
fn what_is_not_in_the_table_is_denied() {
    let apps = vec![
        AppEntry {
            code: "nothing".into(),
            ..AppEntry::default()
        },
        AppEntry {
            code: "some".into(),
            operations: vec!["script.execute".into(), "agent.state".into()],
            accounts: vec!["root".into()],
            targets: vec!["agent-1".into(), "cloud:3".into()],
            others_tasks: OthersTasks::Read,
            ..AppEntry::default()
        },
        AppEntry {
            disabled: true,
            others_tasks: OthersTasks::All,
            ..app("off", "x")
        },
    ];
    let auth = Authenticator::new(&AuthzConfig {
        apps,
        ..AuthzConfig::default()
    })
    .unwrap();
    let policy = auth.policy();
    let check = |app: &str, operation, account: &str, target: &str, cloud| {
        policy.check(
            &caller(app),
            operation,
            [account].into_iter(),
            [(target, cloud)].into_iter(),
        )
    };
    use Operation::{AgentInfo, AgentState, ScriptExecute};
    assert!(check("some", ScriptExecute, "root", "agent-1", None).is_ok());
    assert!(check("some", ScriptExecute, "root", "anything", Some(3)).is_ok());
    for operation in Operation::ALL {
        assert!(policy.check_operation(&caller("nothing"), *operation).is_err());
        assert!(policy.check_operation(&caller("off"), *operation).is_err());
        assert!(policy.check_operation(&caller("unheard of"), *operation).is_err());
    }
    assert!(matches!(
        check("some", AgentInfo, "root", "agent-1", None),
        Err(Denied::Operation { .. })
    ));
    for account in ["roo", "root2", "Root", "", "*"] {
        assert!(
            matches!(
                check("some", ScriptExecute, account, "agent-1", None),
                Err(Denied::Account { .. })
            ),
            "{account}"
        );
    }
    for (target, cloud) in [
        ("agent-", None),
        ("agent-10", None),
        ("AGENT-1", None),
        ("cloud:3", None),
        ("*", None),
        ("x", Some(33)),
    ] {
        assert!(
            matches!(
                check("some", AgentState, "root", target, cloud),
                Err(Denied::Target { .. })
            ),
            "{target}"
        );
    }
    // One bad target among good ones is enough.
    let many = [("agent-1", None), ("x", Some(3)), ("agent-2", Some(0))];
    let denied = policy
        .check(&caller("some"), ScriptExecute, ["root"].into_iter(), many.into_iter())
        .unwrap_err();
    assert!(denied.to_string().contains("agent-2"), "{denied}");

    assert!(policy.may_read(&caller("some"), "some") && policy.may_read(&caller("some"), "other"));
    assert!(policy.may_stop(&caller("some"), "some") && !policy.may_stop(&caller("some"), "other"));
    assert!(policy.may_read(&caller("nothing"), "nothing") && !policy.may_read(&caller("nothing"), "some"));
    assert!(!policy.may_read(&caller("off"), "off") && !policy.may_stop(&caller("off"), "some"));
    let operator = Caller {
        via: Via::Operator("x".into()),
        ..caller(OPERATOR_APP)
    };
    assert!(policy.may_stop(&operator, "some") && policy.check_operation(&operator, AgentInfo).is_ok());
}

proptest! {
    /// Against the rule written out plainly.
    #[test]
    fn the_policy_is_the_rule(
        operations in prop::collection::vec(prop::sample::select(vec!["script.execute", "script.read", "agent.state", "*"]), 0..3),
        accounts in prop::collection::vec(prop::sample::select(vec!["root", "roo", "nobody", "*"]), 0..3),
        targets in prop::collection::vec(prop::sample::select(vec!["a", "ab", "cloud:1", "cloud:11", "*"]), 0..3),
        disabled in any::<bool>(),
        account in prop::sample::select(vec!["root", "roo", "nobody", "r", ""]),
        target in prop::sample::select(vec!["a", "ab", "abc", "cloud:1", ""]),
        cloud in prop::option::of(prop::sample::select(vec![1, 11, 111, -1])),
    ) {
        let names = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let entry = AppEntry {
            code: "x".into(),
            operations: names(&operations),
            accounts: names(&accounts),
            targets: names(&targets),
            disabled,
            ..AppEntry::default()
        };
        let auth = Authenticator::new(&AuthzConfig { apps: vec![entry], ..AuthzConfig::default() }).unwrap();
        let expected = !disabled
            && operations.iter().any(|name| ["*", "script.execute"].contains(name))
            && accounts.iter().any(|name| *name == "*" || *name == account)
            && targets.iter().any(|name| {
                *name == "*" || (*name == target && !name.starts_with("cloud:")) || cloud.is_some_and(|cloud| *name == format!("cloud:{cloud}"))
            });
        let allowed =
            auth.policy().check(&caller("x"), Operation::ScriptExecute, [account].into_iter(), [(target, cloud)].into_iter()).is_ok();
        prop_assert_eq!(allowed, expected);
    }
}
