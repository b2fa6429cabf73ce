//! `mainstem info`.

use clap::Args;
use serde_json::json;

use super::connect::{Connect, Globals};
use super::failure::Failure;
use super::output::{self, Format, FormatArg};
use super::units::{show_count, show_time_us};

/// Show what a server says of itself
#[derive(Debug, Args)]
pub struct InfoArgs {
    #[command(flatten)]
    format: FormatArg,
    /// Also list the limits
    #[arg(long)]
    limits: bool,
    #[command(flatten)]
    connect: Connect,
}

impl InfoArgs {
    pub(super) async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let info = self.connect.client(globals)?.server_info().await?;
        if self.format.format == Format::Json {
            return output::json(&json!({
                "version": info.version,
                "cluster": info.cluster,
                "cluster_id": info.cluster_id,
                "node_id": info.node_id,
                "node_name": info.node_name,
                "incarnation": info.incarnation,
                "started_us": info.started_us,
                "time_us": info.time_us,
                "features": info.features,
                "limits": info.limits,
                "alarms": info.alarms,
            }));
        }
        let alarms = if info.alarms.is_empty() {
            "none".to_owned()
        } else {
            info.alarms.join(", ")
        };
        output::data(
            output::pairs(&[
                ("version", info.version),
                ("cluster", format!("{} ({})", info.cluster, info.cluster_id)),
                (
                    "node",
                    format!(
                        "{} (id {}, incarnation {})",
                        info.node_name, info.node_id, info.incarnation
                    ),
                ),
                ("started", show_time_us(info.started_us)),
                ("time", show_time_us(info.time_us)),
                ("features", info.features.join(", ")),
                ("alarms", alarms),
            ])
            .as_bytes(),
        )?;
        if self.limits {
            let mut table = output::table(&["limit", ">value"]);
            for (name, value) in info.limits {
                table.add_row([name, show_count(value)]);
            }
            output::line(table)?;
        }
        Ok(())
    }
}
