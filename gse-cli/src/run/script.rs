//! The body of a submit: one script file, one atomic task, as the platforms make it.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, bail};
use gse_proto::http::{AgentEndpoint, AtomicTaskSpec, ExecuteScript, ScriptFile};

/// Below this directory every account has its own for script files.
const SCRIPT_ROOT: &str = "/tmp/bkgse";
/// Most bytes of a script; larger things are files and go another way.
const MAX_SCRIPT: u64 = 32 * 1024 * 1024;

/// What to run.
#[derive(Debug, PartialEq, Eq)]
pub struct Script {
    /// Content of the script file.
    pub content: String,
    /// Ending of its name; agents choose the interpreter by it when the file does not say.
    pub ending: String,
    /// Arguments.
    pub arguments: Vec<String>,
}

impl Script {
    /// From `--script FILE` and the words after it, or from the words alone.
    ///
    /// # Errors
    /// The file cannot be read, is too large or is not text.
    pub fn of(file: Option<&Path>, words: &[String]) -> anyhow::Result<Self> {
        let Some(path) = file else {
            return Ok(Self {
                content: words.join(" ") + "\n",
                ending: "sh".to_owned(),
                arguments: Vec::new(),
            });
        };
        let shown = path.display();
        let mut bytes = Vec::new();
        let read = if path == Path::new("-") {
            std::io::stdin().take(MAX_SCRIPT + 1).read_to_end(&mut bytes)
        } else {
            std::fs::File::open(path).and_then(|file| file.take(MAX_SCRIPT + 1).read_to_end(&mut bytes))
        };
        read.with_context(|| format!("cannot read the script {shown}"))?;
        if bytes.len() as u64 > MAX_SCRIPT {
            bail!("the script {shown} is larger than {} MiB", MAX_SCRIPT / (1024 * 1024));
        }
        let Ok(content) = String::from_utf8(bytes) else {
            bail!("the script {shown} is not text in UTF-8");
        };
        if content.trim().is_empty() {
            bail!("the script {shown} is empty");
        }
        let ending = path
            .extension()
            .and_then(|ending| ending.to_str())
            .filter(|ending| ending.len() <= 8 && ending.bytes().all(|b| b.is_ascii_alphanumeric()))
            .unwrap_or("sh");
        Ok(Self {
            content,
            ending: ending.to_owned(),
            arguments: words.to_vec(),
        })
    }

    /// The body of the call. `unique` makes the file's name unique.
    #[must_use]
    pub fn body(self, targets: &[String], user: &str, timeout_seconds: u32, unique: &str) -> ExecuteScript {
        let dir = format!("{SCRIPT_ROOT}/{user}");
        let name = format!("bk_gse_script_{unique}.{}", self.ending);
        let mut command = format!("{dir}/{name}");
        for argument in &self.arguments {
            command.push(' ');
            command.push_str(&quoted(argument));
        }
        ExecuteScript {
            agents: targets
                .iter()
                .map(|id| AgentEndpoint {
                    bk_agent_id: id.clone(),
                    user: user.to_owned(),
                    ..Default::default()
                })
                .collect(),
            scripts: vec![ScriptFile {
                script_name: name,
                script_store_dir: dir,
                script_content: self.content,
            }],
            atomic_tasks: vec![AtomicTaskSpec {
                atomic_task_id: 0,
                command,
                timeout_seconds: i64::from(timeout_seconds),
            }],
            atomic_tasks_relations: Vec::new(),
        }
    }
}

/// The account's name goes into a path and into a command line.
///
/// # Errors
/// It could mean something else there.
pub fn check_user(user: &str) -> anyhow::Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-@".contains(c) || (!c.is_ascii() && c.is_alphanumeric());
    if user.is_empty() || user.len() > 64 || user.starts_with(['-', '.']) || !user.chars().all(plain) {
        bail!("\"{}\" is not the name of an account", crate::text::one_line(user));
    }
    Ok(())
}

/// One word of a shell's command line.
fn quoted(word: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-/=:,@%+".contains(&b);
    if !word.is_empty() && word.bytes().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_become_a_script_and_a_file_takes_them_as_arguments() {
        let words = ["ls".to_owned(), "-l".to_owned()];
        let script = Script::of(None, &words).unwrap();
        assert_eq!(script.content, "ls -l\n");
        let body = script.body(&["a".into(), "b".into()], "root", 60, "u1");
        assert_eq!(body.scripts[0].script_name, "bk_gse_script_u1.sh");
        assert_eq!(body.scripts[0].script_store_dir, "/tmp/bkgse/root");
        assert_eq!(body.atomic_tasks[0].command, "/tmp/bkgse/root/bk_gse_script_u1.sh");
        assert_eq!(body.atomic_tasks[0].timeout_seconds, 60);
        assert_eq!(body.agents.len(), 2);

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.py");
        std::fs::write(&path, "print(1)").unwrap();
        let script = Script::of(
            Some(&path),
            &["it's".to_owned(), "a;b".to_owned(), String::new(), "-x=1".to_owned()],
        )
        .unwrap();
        let body = script.body(&["a".into()], "app", 0, "u1");
        assert_eq!(
            body.atomic_tasks[0].command,
            r"/tmp/bkgse/app/bk_gse_script_u1.py 'it'\''s' 'a;b' '' -x=1"
        );
    }

    #[test]
    fn files_that_are_no_scripts_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.sh");
        for (content, word) in [(&b""[..], "empty"), (b" \n", "empty"), (b"\xff\xfe", "UTF-8")] {
            std::fs::write(&path, content).unwrap();
            let error = format!("{:#}", Script::of(Some(&path), &[]).unwrap_err());
            assert!(error.contains(word) && error.contains("x.sh"), "{error}");
        }
        assert!(
            format!("{:#}", Script::of(Some(Path::new("/nonexistent")), &[]).unwrap_err()).contains("/nonexistent")
        );
    }

    #[test]
    fn accounts_that_would_leave_their_directory_are_refused() {
        for good in ["root", "svc-app", "a.b", "用户"] {
            assert!(check_user(good).is_ok(), "{good}");
        }
        for bad in ["", "..", "a/b", "a b", "-x", "a\nb", "$HOME", "a;b"] {
            assert!(check_user(bad).is_err(), "{bad}");
        }
    }
}
