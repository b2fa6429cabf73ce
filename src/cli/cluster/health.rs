//! `mainstem cluster health`.

use std::time::{Duration, Instant};

use clap::Args;

use super::{json, show};
use crate::cli::failure::{Exit, Failure};
use crate::cli::output::{self, Format, FormatArg};
use crate::cli::units;
use crate::client::proto::GetReportResponse;
use crate::client::{Client, ClientError};

/// Say whether all is well: exits with 0, or with 10 and what is wrong
#[derive(Debug, Args)]
pub(super) struct HealthArgs {
    /// Look again and again, and tell what changes
    #[arg(long)]
    watch: bool,
    /// Look again and again, and end when all is well
    #[arg(long, conflicts_with = "watch")]
    exit_when_healthy: bool,
    /// With --exit-when-healthy: at least so many nodes must be there, too
    #[arg(long, value_name = "N", requires = "exit_when_healthy")]
    nodes: Option<u32>,
    /// How often to look
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = units::duration)]
    interval: Duration,
    /// Give up after so long, with 10 [default: never]
    #[arg(long, value_name = "DURATION", value_parser = units::duration)]
    within: Option<Duration>,
    #[command(flatten)]
    format: FormatArg,
}

impl HealthArgs {
    pub(super) async fn run(self, client: &Client) -> Result<(), Failure> {
        let begun = Instant::now();
        let mut said = String::new();
        loop {
            let looked = client.cluster_report(None, Vec::new()).await;
            let repeats = self.watch || self.exit_when_healthy;
            let (well, text) = match looked {
                Ok(report) => self.tell(&report)?,
                // One that starts, or is between two leaders, is not well yet.
                Err(e) if repeats && e.is_unavailable() => (false, unreachable(&e)),
                Err(e) => return Err(e.into()),
            };
            // Each news once.
            if text != said {
                output::data(text.as_bytes())?;
                said = text;
            }
            let late = self.within.is_some_and(|within| begun.elapsed() >= within);
            if self.watch && !late {
                tokio::time::sleep(self.interval).await;
                continue;
            }
            if well {
                return Ok(());
            }
            if self.exit_when_healthy && !late {
                tokio::time::sleep(self.interval).await;
                continue;
            }
            return Err(Failure::new(Exit::Unhealthy, "the cluster is not healthy")
                .hint("`mainstem cluster report --problems` shows the shards concerned"));
        }
    }

    fn tell(&self, report: &GetReportResponse) -> Result<(bool, String), Failure> {
        let live = report.summary.as_ref().map_or(0, |s| s.live_nodes);
        let enough = self.nodes.is_none_or(|nodes| live >= nodes);
        let well = report.problems.is_empty() && enough;
        let text = match self.format.format {
            Format::Json => format!("{}\n", json::health_json(report, well)),
            Format::Table => show::health(report, well),
        };
        Ok((well, text))
    }
}

fn unreachable(e: &ClientError) -> String {
    format!("unhealthy: {}\n", e.message)
}
