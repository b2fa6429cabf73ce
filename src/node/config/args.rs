//! The flags of `mainstem server` and `mainstem dev`, made from the table of settings.

use std::path::PathBuf;

use clap::builder::ValueParser;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, Error, FromArgMatches};

use super::human::Kind;
use super::table::{SETTINGS, Setting};

/// What `mainstem server` was given. The environment and the file are read later, by [`super::Effective::load`].
#[derive(Debug, Clone, Default)]
pub struct ServerArgs {
    /// `--config`.
    pub config: Option<PathBuf>,
    /// `--print-config`.
    pub print_config: bool,
    /// One for each setting given as a flag.
    pub settings: Vec<(&'static Setting, String)>,
}

impl Args for ServerArgs {
    fn augment_args(cmd: Command) -> Command {
        let cmd = cmd
            .arg(
                Arg::new("config")
                    .long("config")
                    .short('c')
                    .value_name("FILE")
                    .value_parser(clap::value_parser!(PathBuf))
                    .help("The configuration file: TOML [env: MAINSTEM_CONFIG]"),
            )
            .arg(
                Arg::new("print-config")
                    .long("print-config")
                    .action(ArgAction::SetTrue)
                    .help("Print the configuration in effect, with the origin of each value, and exit"),
            );
        SETTINGS.iter().fold(cmd, |cmd, setting| cmd.arg(flag(setting)))
    }

    fn augment_args_for_update(cmd: Command) -> Command {
        Self::augment_args(cmd)
    }
}

fn flag(setting: &'static Setting) -> Arg {
    let help = format!(
        "{} [env: {}] [default: {}]",
        setting.help.trim_end_matches('.').replace(" …", ""),
        setting.env,
        setting.default_text()
    );
    let arg = Arg::new(setting.flag)
        .long(setting.flag)
        .value_name(setting.kind.placeholder())
        .value_parser(ValueParser::string())
        .help_heading(setting.section)
        .help(help);
    if setting.kind == Kind::Switch {
        // `--insecure` alone means true.
        return arg.num_args(0..=1).require_equals(true).default_missing_value("true");
    }
    arg
}

impl FromArgMatches for ServerArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
        let given = |setting: &'static Setting| {
            matches
                .get_one::<String>(setting.flag)
                .map(|text| (setting, text.clone()))
        };
        Ok(Self {
            config: matches.get_one::<PathBuf>("config").cloned(),
            print_config: matches.get_flag("print-config"),
            settings: SETTINGS.iter().filter_map(given).collect(),
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// What `mainstem dev` was given: everything `mainstem server` takes, with other defaults.
#[derive(Debug, Clone, Default, Args)]
pub struct DevArgs {
    /// Start a cluster of so many nodes, one process each; with --data-dir DIR their data is kept in DIR/n1 and so on,
    /// otherwise it is removed at the end.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=7))]
    pub nodes: u8,

    /// Keep the data in a temporary directory that is removed at the end.
    #[arg(long, conflicts_with = "data-dir")]
    pub ephemeral: bool,

    #[command(flatten)]
    pub server: ServerArgs,
}
