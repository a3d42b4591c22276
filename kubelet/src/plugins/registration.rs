//! The handshake with a plugin: `pluginregistration` v1.

use std::time::Duration;

use crate::grpc::{Client, proto};

/// For a plugin to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

proto! {
message InfoRequest {}
message PluginInfo { string r#type = 1; string name = 2; string endpoint = 3; repeated string supported_versions = 4; }
message RegistrationStatus { bool plugin_registered = 1; string error = 2; }
message RegistrationStatusResponse {}
}

/// What the plugin is.
pub(super) async fn get_info(client: &Client) -> Result<PluginInfo, String> {
    let info: PluginInfo = client
        .call("/pluginregistration.Registration/GetInfo", InfoRequest {}, ANSWER_TIMEOUT)
        .await
        .map_err(|status| format!("ask the plugin what it is: {}", status.message()))?;
    if info.name.is_empty() { Err("the plugin has no name".into()) } else { Ok(info) }
}

/// Tells the plugin whether it was taken in.
pub(super) async fn notify(client: &Client, outcome: &Result<(), String>) -> Result<(), String> {
    let status = RegistrationStatus {
        plugin_registered: outcome.is_ok(),
        error: outcome.as_ref().err().cloned().unwrap_or_default(),
    };
    client
        .call::<_, RegistrationStatusResponse>(
            "/pluginregistration.Registration/NotifyRegistrationStatus",
            status,
            ANSWER_TIMEOUT,
        )
        .await
        .map(drop)
        .map_err(|status| format!("tell the plugin that it is registered: {}", status.message()))
}
