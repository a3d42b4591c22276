//! ValidatingAdmissionPolicies: what type checks of their expressions found, in their status.

use std::sync::Arc;

use coracle_api::admission::typecheck;
use coracle_api::informer::Informer;
use coracle_api::server::ApiServer;
use k8s_openapi::api::admissionregistration::v1::{
    ExpressionWarning, TypeChecking, ValidatingAdmissionPolicy, ValidatingAdmissionPolicyStatus,
};
use kube::Api;

use crate::machine::{Controller, Error, Host, Key, Outcome, Sources, own};

pub(crate) struct PolicyStatus {
    host: Host,
    api: Arc<ApiServer>,
    policies: Arc<Informer<ValidatingAdmissionPolicy>>,
}

impl PolicyStatus {
    pub(crate) fn new(api: &Arc<ApiServer>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        Self { policies: host.informer(), api: api.clone(), host }
    }
}

impl Controller for PolicyStatus {
    const NAME: &'static str = "validatingadmissionpolicy-status-controller";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        sources.watch(&self.policies, own);
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(policy) = self.policies.get("", &key.name) else { return Ok(Outcome::Done) };
        let checked = policy.status.as_ref().is_some_and(|status| {
            status.observed_generation == policy.metadata.generation && status.type_checking.is_some()
        });
        if checked {
            return Ok(Outcome::Done);
        }
        let json = serde_json::to_value(&*policy).map_err(|error| Error::Invalid(error.to_string()))?;
        let warnings: Vec<_> = typecheck::warnings(&self.api, &json)
            .into_iter()
            .map(|found| ExpressionWarning { field_ref: found.field_ref, warning: found.warning })
            .collect();
        let mut changed = (*policy).clone();
        changed.status = Some(ValidatingAdmissionPolicyStatus {
            observed_generation: policy.metadata.generation,
            type_checking: Some(TypeChecking {
                expression_warnings: Some(warnings).filter(|warnings| !warnings.is_empty()),
            }),
            ..policy.status.clone().unwrap_or_default()
        });
        self.host.replace_status(&Api::all(self.host.client.clone()), &changed).await?;
        Ok(Outcome::Done)
    }
}
