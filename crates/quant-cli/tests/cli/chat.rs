//! Conversations.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::support::{QUANT, quant, text, trained_model, wait};

const TEMPLATE: &str = "{% for m in messages %}{{ m.content }}{% if not loop.last %} {% endif %}{% endfor %}";

#[test]
fn one_message_is_answered() {
    let folder = tempfile::tempdir().unwrap();
    let template = folder.path().join("chat.jinja");
    std::fs::write(&template, TEMPLATE).unwrap();
    let model = trained_model();
    let mut args = vec!["chat", text(&model), "--once", "once upon a time", "--max-new-tokens", "8"];
    quant(&args).fails(&["chat template", "--template"]);
    args.extend(["--template", text(&template)]);
    let printed = quant(&args).ok().stdout;
    args.extend(["--json", "--system", "a tale:"]);
    let report = quant(&args).ok().json();
    assert_eq!(report["prompt"], "a tale: once upon a time");
    assert_eq!((&report["generated_tokens"], &report["finish"]), (&8.into(), &"length".into()));
    let generated = quant(&["generate", text(&model), "--prompt", "once upon a time", "-n", "8", "--json"]);
    // This tokenizer adds no token of its own, so the template's text is the whole prompt.
    assert_eq!(printed.trim_end(), generated.ok().json()["text"]);
    quant(&["chat", text(&model), "--json"]).ends(2, &["--once"]);
}

#[test]
fn a_conversation_remembers_until_it_is_reset() {
    let folder = tempfile::tempdir().unwrap();
    let template = folder.path().join("chat.jinja");
    std::fs::write(&template, TEMPLATE).unwrap();
    let model = trained_model();
    let talk = |lines: &str| {
        let mut child = Command::new(QUANT)
            .args(["chat", text(&model), "--template", text(&template), "-n", "6"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
        let output = child.stdout.take().unwrap();
        assert_eq!(wait(child, Duration::from_secs(60)).code(), Some(0));
        std::io::read_to_string(output).unwrap()
    };
    let [first, second] = ["once upon a time", "the little fox"];
    let answers = talk(&format!("{first}\n{second}\n/reset\n{first}\n/quit\nnever\n"));
    let answers: Vec<&str> = answers.lines().collect();
    assert_eq!((answers.len(), answers[0]), (3, answers[2]), "{answers:?}");
    let alone = talk(second);
    assert_ne!(answers[1], alone.trim_end_matches('\n'), "the second answer depends on what was said before");
}
