//! The table of calls of `RuntimeService`.

use futures::stream;
use tonic::Status;

use super::api;
use super::runtime::Runtime;
use crate::grpc::Router;

/// Rows of one message of a streamed list.
const STREAMED_AT_ONCE: usize = 500;

/// A list in parts.
fn parts<T: Clone, A>(rows: &[T], part: impl Fn(Vec<T>) -> A) -> stream::Iter<std::vec::IntoIter<Result<A, Status>>> {
    let parts: Vec<_> = rows.chunks(STREAMED_AT_ONCE).map(|rows| Ok(part(rows.to_vec()))).collect();
    stream::iter(parts)
}

impl Runtime {
    /// Adds the calls to a router.
    pub(super) fn routes(&self, mut router: Router) -> Router {
        macro_rules! calls {
            ($($name:ident => $method:ident),* ;) => {
                $(
                    let this = self.clone();
                    router = router.unary(concat!("/runtime.v1.RuntimeService/", stringify!($name)), move |request| {
                        let this = this.clone();
                        async move { this.$method(request).await }
                    });
                )*
            };
        }
        calls! {

                Version => version, Status => status, RuntimeConfig => runtime_config,
                UpdateRuntimeConfig => update_runtime_config, CheckpointContainer => checkpoint,
                RunPodSandbox => run_pod_sandbox, StopPodSandbox => stop_pod_sandbox,
                RemovePodSandbox => remove_pod_sandbox, PodSandboxStatus => pod_sandbox_status,
                UpdatePodSandboxResources => update_sandbox,
                CreateContainer => create_container, StartContainer => start_container, StopContainer => stop_container,
                RemoveContainer => remove_container, ContainerStatus => container_status,
                UpdateContainerResources => update_container, ReopenContainerLog => reopen_log,
                ExecSync => exec_sync, Exec => exec, Attach => attach, PortForward => port_forward,
                ContainerStats => container_stats, PodSandboxStats => pod_sandbox_stats,
                ListMetricDescriptors => metric_descriptors;

        }
        macro_rules! list {
            ($list:ident, $asked:ident, $answer:ident . $field:ident, $stream:ident, $stream_asked:ident,
             $stream_answer:ident . $stream_field:ident, |$this:ident, $request:ident| $rows:expr) => {{
                let this = self.clone();
                router = router.unary(
                    concat!("/runtime.v1.RuntimeService/", stringify!($list)),
                    move |$request: api::$asked| {
                        let $this = this.clone();
                        async move { Ok(api::$answer { $field: $rows }) }
                    },
                );
                let this = self.clone();
                router = router.streaming(
                    concat!("/runtime.v1.RuntimeService/", stringify!($stream)),
                    move |$request: api::$stream_asked| {
                        let $this = this.clone();
                        async move { Ok(parts(&$rows, |$stream_field| api::$stream_answer { $stream_field })) }
                    },
                );
            }};
        }
        list!(
            ListPodSandbox,
            ListPodSandboxRequest,
            ListPodSandboxResponse.items,
            StreamPodSandboxes,
            StreamPodSandboxesRequest,
            StreamPodSandboxesResponse.pod_sandboxes,
            |this, request| this.sandboxes(request.filter).await?
        );
        list!(
            ListContainers,
            ListContainersRequest,
            ListContainersResponse.containers,
            StreamContainers,
            StreamContainersRequest,
            StreamContainersResponse.containers,
            |this, request| this.containers(request.filter).await?
        );
        list!(
            ListContainerStats,
            ListContainerStatsRequest,
            ListContainerStatsResponse.stats,
            StreamContainerStats,
            StreamContainerStatsRequest,
            StreamContainerStatsResponse.container_stats,
            |this, request| this.all_container_stats(request.filter).await?
        );
        list!(
            ListPodSandboxStats,
            ListPodSandboxStatsRequest,
            ListPodSandboxStatsResponse.stats,
            StreamPodSandboxStats,
            StreamPodSandboxStatsRequest,
            StreamPodSandboxStatsResponse.pod_sandbox_stats,
            |this, request| this.all_sandbox_stats(request.filter).await?
        );
        list!(
            ListPodSandboxMetrics,
            ListPodSandboxMetricsRequest,
            ListPodSandboxMetricsResponse.pod_metrics,
            StreamPodSandboxMetrics,
            StreamPodSandboxMetricsRequest,
            StreamPodSandboxMetricsResponse.pod_sandbox_metrics,
            |this, _request| this.all_metrics().await?
        );
        let this = self.clone();
        router.streaming("/runtime.v1.RuntimeService/GetContainerEvents", move |_: api::GetEventsRequest| {
            let this = this.clone();
            async move { Ok(this.events.stream()) }
        })
    }
}
