//! One line from QEMU.

use serde_json::Value;

use super::{QmpError, QmpEvent};

/// A line from QEMU, sorted by what it is.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Message {
    /// The first line of a connection.
    Greeting,
    /// A command was executed.
    Return { id: Option<u64>, value: Value },
    /// A command was refused.
    Error { id: Option<u64>, class: String, description: String },
    /// Something happened.
    Event(QmpEvent),
}

impl Message {
    /// Never panics, whatever the line says. `serde_json` bounds the nesting.
    pub(super) fn parse(line: &str) -> Result<Self, QmpError> {
        let mut value: Value = serde_json::from_str(line).map_err(|_| QmpError::Malformed("a line is no JSON"))?;
        let Some(object) = value.as_object_mut() else {
            return Err(QmpError::Malformed("a line is no object"));
        };
        let id = object.get("id").and_then(Value::as_u64);
        if let Some(value) = object.remove("return") {
            return Ok(Self::Return { id, value });
        }
        if let Some(error) = object.remove("error") {
            let text = |key| error.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
            return Ok(Self::Error { id, class: text("class"), description: text("desc") });
        }
        if let Some(Value::String(name)) = object.remove("event") {
            return Ok(Self::Event(QmpEvent { name, data: object.remove("data").unwrap_or_default() }));
        }
        if object.contains_key("QMP") {
            return Ok(Self::Greeting);
        }
        Err(QmpError::Malformed("an unknown kind of message"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn the_four_kinds_of_lines_are_told_apart() {
        let parse = |v: Value| Message::parse(&v.to_string()).unwrap();
        assert_eq!(parse(json!({"QMP": {"version": {}, "capabilities": ["oob"]}})), Message::Greeting);
        assert_eq!(
            parse(json!({"return": {"a": 1}, "id": 3})),
            Message::Return { id: Some(3), value: json!({"a": 1}) }
        );
        let refused = Message::Error { id: None, class: "GenericError".into(), description: "No".into() };
        assert_eq!(parse(json!({"error": {"class": "GenericError", "desc": "No"}})), refused);
        let event = QmpEvent { name: "RESUME".into(), data: Value::Null };
        assert_eq!(parse(json!({"event": "RESUME", "timestamp": {}})), Message::Event(event));
    }

    #[test]
    fn deep_nesting_is_refused() {
        let line = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(Message::parse(&line).is_err());
        let line = format!("{{\"return\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(Message::parse(&line).is_err());
    }

    proptest! {
        #[test]
        fn parsing_any_line_never_panics(line in ".{0,200}") {
            let _ = Message::parse(&line);
        }

        #[test]
        fn parsing_mangled_messages_never_panics(
            key in "(return|error|event|QMP|id|data|x)",
            value in prop_oneof![Just("null"), Just("-1"), Just("1e999"), Just("{}"), Just("[]"), Just("\"s\""), Just("{\"desc\":1}")],
            id in any::<i128>(),
        ) {
            let _ = Message::parse(&format!("{{\"{key}\":{value},\"id\":{id}}}"));
        }
    }
}
