//! Runs the command line and holds its one object against `docs/json.schema.json`.

use std::ffi::OsStr;
use std::fmt::Debug;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// Adds `args` and `--json` to the command, and returns the object that it prints; its exit status must be this one.
pub(crate) fn run<W: AsRef<OsStr> + Debug>(command: &mut Command, args: &[W], status: i32) -> Value {
    let output = command.args(args).arg("--json").output().unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{args:?}\n{stdout}\n{stderr}");
    let object: Value = serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{args:?}: {error}\n{stdout}"));
    assert_eq!(object["ok"], status == 0);
    let schema = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/json.schema.json")).unwrap();
    let schema: Value = serde_json::from_str(&schema).unwrap();
    // The one schema of this object, rather than `oneOf`: its errors say what is wrong.
    let name = if status == 0 { object["command"].as_str().unwrap() } else { "failure" };
    if let Err(error) = fits(&schema["$defs"][name], &object, &schema["$defs"], name) {
        panic!("{args:?}: {error}\n{stdout}");
    }
    object
}

/// Whether `value` fits: exactly the keywords that the schema uses; an unknown one is an error.
fn fits(schema: &Value, value: &Value, defs: &Value, at: &str) -> Result<(), String> {
    let wrong = |keyword: &str, rule: &Value| Err(format!("{at}: {value} does not fit {keyword} {rule}"));
    let length = value.as_array().map_or(0, Vec::len) as u64;
    for (keyword, rule) in schema.as_object().ok_or(format!("{at}: no schema"))? {
        let holds = match keyword.as_str() {
            "$ref" => {
                let name = rule.as_str().unwrap().strip_prefix("#/$defs/").unwrap();
                fits(&defs[name], value, defs, at)?;
                true
            }
            "anyOf" => rule.as_array().unwrap().iter().any(|one| fits(one, value, defs, at).is_ok()),
            "const" => value == rule,
            "enum" => rule.as_array().unwrap().contains(value),
            "type" => match rule {
                Value::Array(types) => types.iter().any(|name| is(value, name.as_str().unwrap())),
                name => is(value, name.as_str().unwrap()),
            },
            "minimum" => value.is_null() || value.as_f64() >= rule.as_f64(),
            "minItems" => value.is_null() || length >= rule.as_u64().unwrap(),
            "maxItems" => value.is_null() || length <= rule.as_u64().unwrap(),
            "pattern" => value.as_str().is_some_and(|text| matches_pattern(rule.as_str().unwrap(), text)),
            "items" => {
                for (index, item) in value.as_array().into_iter().flatten().enumerate() {
                    fits(rule, item, defs, &format!("{at}[{index}]"))?;
                }
                true
            }
            "required" => {
                let names = || rule.as_array().unwrap().iter().map(|name| name.as_str().unwrap());
                !value.is_object() || names().all(|name| value.get(name).is_some())
            }
            "properties" => {
                for (name, item) in value.as_object().into_iter().flatten() {
                    if let Some(schema) = rule.get(name) {
                        fits(schema, item, defs, &format!("{at}.{name}"))?;
                    }
                }
                true
            }
            "additionalProperties" => {
                let known = |name: &str| schema.get("properties").is_some_and(|known| known.get(name).is_some());
                let mut others = value.as_object().into_iter().flatten().filter(|(name, _)| !known(name));
                match rule {
                    Value::Bool(false) => others.next().is_none(),
                    rule => others.all(|(_, item)| fits(rule, item, defs, at).is_ok()),
                }
            }
            other => return Err(format!("{at}: the schema uses {other}, which this test does not know")),
        };
        if !holds {
            return wrong(keyword, rule);
        }
    }
    Ok(())
}

fn is(value: &Value, name: &str) -> bool {
    match name {
        "array" => value.is_array(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_u64() || value.is_i64(),
        "null" => value.is_null(),
        "number" => value.is_number(),
        "object" => value.is_object(),
        "string" => value.is_string(),
        other => panic!("no such type: {other}"),
    }
}

/// The patterns that the schema uses.
fn matches_pattern(pattern: &str, text: &str) -> bool {
    let hex = |digits| text.len() == digits && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let version = |parts| text.split('.').count() == parts && text.split('.').all(number);
    match pattern {
        "^[0-9a-f]{16}$" => hex(16),
        "^[0-9a-f]{64}$" => hex(64),
        "^(host|host:staged|cuda:[0-9]+)$" => {
            matches!(text, "host" | "host:staged") || text.strip_prefix("cuda:").is_some_and(number)
        }
        "^[0-9]+\\.[0-9]+$" => version(2),
        "^[0-9]+\\.[0-9]+\\.[0-9]+$" => version(3),
        other => panic!("the schema uses the pattern {other}, which this test does not know"),
    }
}
