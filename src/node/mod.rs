//! The composition: configuration → start → serve → drain. What is composed stands behind [`Engine`].

mod anew;
pub mod cluster;
pub mod command;
pub mod config;
mod dev_cluster;
pub mod edge;
pub mod engine;
pub mod listener;
pub mod logging;
pub mod ports;
pub mod run;
pub mod start;
pub mod tls;

pub use command::{dev, server};
pub use config::{Config, DevArgs, ServerArgs};
pub use engine::{Context, Engine, StartError};
pub use ports::Ports;
pub use run::{Exit, run};
