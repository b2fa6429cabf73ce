//! The metrics recorder of the process.

use std::sync::OnceLock;
use std::time::Duration;

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

/// How often [`Recorder::tend`] should be called.
pub const TEND_EVERY: Duration = Duration::from_secs(5);

/// Histogram buckets of durations, in seconds: from 50 µs (a sync on a quick disk) to a minute.
const SECONDS: &[f64] = &[
    0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
    60.0,
];
/// Of sizes and counts.
const COUNTS: &[f64] = &[
    1.0,
    4.0,
    16.0,
    64.0,
    256.0,
    1_024.0,
    4_096.0,
    16_384.0,
    65_536.0,
    262_144.0,
    1_048_576.0,
    4_194_304.0,
    16_777_216.0,
];

/// Renders what the process counts. There is one for a process; clones are handles to it.
#[derive(Clone)]
pub struct Recorder {
    handle: PrometheusHandle,
}

impl Recorder {
    /// The recorder of this process, installed at the first call. To be called before anything is counted: what
    /// registered before counts into the void.
    pub fn install() -> Self {
        static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
        let handle = HANDLE.get_or_init(|| {
            let builder = PrometheusBuilder::new()
                .set_buckets(COUNTS)
                .and_then(|builder| builder.set_buckets_for_metric(Matcher::Suffix("_seconds".into()), SECONDS))
                .expect("the lists of buckets are not empty");
            let recorder = builder.build_recorder();
            let handle = recorder.handle();
            if metrics::set_global_recorder(recorder).is_err() {
                tracing::warn!("another metrics recorder is installed; /metrics stays empty");
            }
            crate::base::metric_names::describe_all();
            handle
        });
        Self { handle: handle.clone() }
    }

    /// In the Prometheus text format.
    pub fn render(&self) -> String {
        self.handle.render()
    }

    /// Folds what histograms gathered, so that memory stays bounded when nobody scrapes.
    pub fn tend(&self) {
        self.handle.run_upkeep();
    }
}
