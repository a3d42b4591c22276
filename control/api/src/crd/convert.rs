//! Conversion of custom resources between versions by a webhook.

use std::sync::{Arc, Weak};
use std::time::Duration;

use async_trait::async_trait;
use serde_json::{Value, json};

use crate::kinds::Conversion;
use crate::object;
use crate::server::ApiServer;
use crate::status::Status;

/// Time that a webhook gets.
const PATIENCE: Duration = Duration::from_secs(30);

/// The conversion webhook of a definition.
pub(super) struct Webhook {
    api: Weak<ApiServer>,
    client_config: Value,
}

impl Webhook {
    pub(super) fn new(api: &Arc<ApiServer>, spec: &Value) -> Self {
        let client_config = spec.pointer("/conversion/webhook/clientConfig").cloned().unwrap_or_default();
        Self { api: Arc::downgrade(api), client_config }
    }
}

#[async_trait]
impl Conversion for Webhook {
    async fn convert(&self, objects: Vec<Value>, api_version: &str) -> Result<Vec<Value>, Status> {
        let api = self.api.upgrade().ok_or_else(|| Status::unavailable("the server is stopping"))?;
        let mine = |object: &Value| object["apiVersion"].as_str() != Some(api_version);
        let to_convert: Vec<Value> = objects.iter().filter(|object| mine(object)).cloned().collect();
        if to_convert.is_empty() {
            return Ok(objects);
        }
        let kind = object::text(&to_convert[0], "/kind").to_owned();
        let from = object::text(&to_convert[0], "/apiVersion").to_owned();
        let failed = |why: &dyn std::fmt::Display| {
            Status::new(500, "", format!("conversion webhook for {from}, Kind={kind} failed: {why}"))
        };
        let uid = uuid::Uuid::new_v4().to_string();
        let review = json!({
            "kind": "ConversionReview", "apiVersion": "apiextensions.k8s.io/v1",
            "request": {"uid": uid, "desiredAPIVersion": api_version, "objects": to_convert},
        });
        let call = crate::outbound::post_json(&api, &self.client_config, &review);
        let answer = tokio::time::timeout(PATIENCE, call)
            .await
            .map_err(|_| failed(&"context deadline exceeded"))?
            .map_err(|error| failed(&error))?;
        let response = &answer["response"];
        if response["uid"].as_str() != Some(uid.as_str()) {
            return Err(failed(&format!("invalid response.uid: expected {uid}, got {}", response["uid"])));
        }
        if response.pointer("/result/status").and_then(Value::as_str) != Some("Success") {
            return Err(failed(&object::text(response, "/result/message")));
        }
        let converted = response["convertedObjects"].as_array().cloned().unwrap_or_default();
        if converted.len() != to_convert.len() {
            return Err(failed(&format!(
                "webhook returned {} objects, expected {}",
                converted.len(),
                to_convert.len()
            )));
        }
        let mut converted = converted.into_iter();
        let mut done = Vec::with_capacity(objects.len());
        for object in objects {
            if !mine(&object) {
                done.push(object);
                continue;
            }
            let mut new = converted.next().ok_or_else(|| failed(&"webhook returned too few objects"))?;
            if new["apiVersion"].as_str() != Some(api_version) {
                return Err(failed(&format!("webhook returned an object of version {}", new["apiVersion"])));
            }
            // A webhook may change labels and annotations; the rest of the metadata is not its business.
            let given = new.get("metadata").cloned().unwrap_or_default();
            let mut metadata = object["metadata"].clone();
            for member in ["labels", "annotations"] {
                match given.get(member).filter(|value| !value.is_null()) {
                    Some(value) => metadata[member] = value.clone(),
                    None => object::remove(&mut metadata, member),
                }
            }
            new["metadata"] = metadata;
            done.push(new);
        }
        Ok(done)
    }
}
