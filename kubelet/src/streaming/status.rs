//! How a session ended, as a `v1.Status` on the error channel.

use serde_json::{Value, json};

/// Ended well.
pub(super) fn success() -> Value {
    json!({ "metadata": {}, "status": "Success" })
}

/// Ended with an exit code.
pub(super) fn exited(code: i32) -> Value {
    if code == 0 {
        return success();
    }
    json!({
        "metadata": {},
        "status": "Failure",
        "message": format!("command terminated with non-zero exit code: exit status {code}"),
        "reason": "NonZeroExitCode",
        "details": { "causes": [{ "reason": "ExitCode", "message": code.to_string() }] },
    })
}

/// Could not be carried out.
pub(super) fn failed(message: &str) -> Value {
    json!({
        "metadata": {},
        "status": "Failure",
        "message": format!("Internal error occurred: {message}"),
        "reason": "InternalError",
        "details": { "causes": [{ "message": message }] },
        "code": 500,
    })
}

/// The form of protocols before v4: nothing for success, else the message.
pub(super) fn plain(status: &Value) -> String {
    if status["status"] == "Success" {
        String::new()
    } else {
        status["message"].as_str().unwrap_or_default().to_owned()
    }
}
