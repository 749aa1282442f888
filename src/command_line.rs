//! The command line: serve (the default), `check-config`, `ctl`, `health`, `token`.

use std::fmt::Display;
use std::io;
use std::io::Write;
use std::path::Path;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use clap::CommandFactory;
use clap::Parser;
use clap::Subcommand;
use clap_complete::Shell;
use tokio::runtime::Builder;

use crate::app;
use crate::config::Config;
use crate::ctl::Ctl;
use crate::health::Health;
use crate::new_token::NewToken;
use crate::pages;
use crate::telemetry;

const FAILED: u8 = 1;
const BAD_USAGE: u8 = 2;

/// `0.1.0 (commit 6bfcc3a1d2e4, dist x86_64-unknown-linux-gnu)`
const VERSION: &str =
    concat!(env!("CARGO_PKG_VERSION"), " (commit ", env!("IM_PRESENCE_COMMIT"), ", ", env!("IM_PRESENCE_BUILD"), ")");

const HELP: &str = "\
Examples:
  im-presence                                     one complete node: gRPC on 127.0.0.1:6000, SQLite in ./im-presence.db
  im-presence --config /etc/im-presence.toml      as configured (.toml or .ini)
  im-presence check-config --config FILE          what is in force, or what is wrong with it
  im-presence ctl bind 42 gw-1:7000 --device phone
  im-presence ctl query 42
  im-presence ctl deliver 42 hello
  im-presence health                              whether the node on this machine is ready
  im-presence token new --role service --name chat   a token, and the entry for auth.tokens_file

Environment:
  IM_PRESENCE__SECTION__KEY   overrides one key of the configuration: IM_PRESENCE__PRESENCE_SERVICE__PORT=7000,
                              IM_PRESENCE__STORE__URL=mysql://app:PASSWORD@db/im
  IM_PRESENCE_ADDR            the node that ctl asks (127.0.0.1:6000)

Exit codes: 0 stopped as asked, 1 could not start or failed, 2 bad usage or configuration. `ctl` has its own: see its help.";

/// Knows which users of an instant-messaging system are online, on which gateway, and hands messages to them.
///
/// Gateways bind the connections of their users; message services ask where a user is and deliver. Without a subcommand
/// it serves until it gets SIGTERM or SIGINT.
#[derive(Parser)]
#[command(version = VERSION, after_help = HELP, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(flatten)]
    file: ConfigFile,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Print the configuration in force, without passwords; or all that is wrong with it, and exit with 2
    CheckConfig(ConfigFile),
    Ctl(Ctl),
    /// Make a token
    #[command(subcommand)]
    Token(Token),
    Health(Health),
    /// Print what a shell reads to complete the command line
    #[command(hide = true)]
    Completions {
        shell: Shell,
    },
    /// Write the man pages into a directory
    #[command(hide = true)]
    Man {
        directory: PathBuf,
    },
}

#[derive(Subcommand)]
enum Token {
    /// Print a new token, which is stored nowhere, and the entry for auth.tokens_file
    New(NewToken),
}

#[derive(Args)]
struct ConfigFile {
    /// Configuration file, .toml or .ini; what it does not say has its default
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Does what the command line says. It stands here and not in the program, because code that waits is compiled where it is
/// first called, and all of the daemon would be compiled twice.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    match cli.command {
        None => with_config(&cli.file, serve),
        Some(Command::CheckConfig(file)) => with_config(&file, |config| {
            let _ = write!(io::stdout(), "{config}"); // a reader that closed its pipe has seen enough
            ExitCode::SUCCESS
        }),
        Some(Command::Ctl(ctl)) => ctl.run(),
        Some(Command::Token(Token::New(token))) => match token.make() {
            Ok(text) => {
                let _ = write!(io::stdout(), "{text}"); // nobody can use what nobody has read
                ExitCode::SUCCESS
            }
            Err(error) => fail(BAD_USAGE, &error),
        },
        Some(Command::Health(health)) => health.run(),
        Some(Command::Completions { shell }) => {
            let _ = write!(io::stdout(), "{}", pages::completions(Cli::command(), shell)); // as above
            ExitCode::SUCCESS
        }
        Some(Command::Man { directory }) => write_man_pages(&directory),
    }
}

fn write_man_pages(directory: &Path) -> ExitCode {
    match pages::write_man_pages(Cli::command(), directory) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(FAILED, &format!("cannot write to {}: {error}", directory.display())),
    }
}

fn with_config(file: &ConfigFile, act: impl FnOnce(Config) -> ExitCode) -> ExitCode {
    match Config::load(file.config.as_deref()) {
        Ok(config) => act(config),
        Err(error) => fail(BAD_USAGE, &error),
    }
}

fn serve(config: Config) -> ExitCode {
    let _logging = telemetry::init_logging(&config.log);
    match Builder::new_multi_thread().enable_all().build().map(|runtime| runtime.block_on(app::run(config))) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => fail(FAILED, &error),
        Err(error) => fail(FAILED, &format!("cannot start threads: {error}")),
    }
}

fn fail(code: u8, error: &impl Display) -> ExitCode {
    let error = error.to_string();
    telemetry::within_a_moment(move || drop(writeln!(io::stderr(), "{error}"))); // the exit code says it, too
    ExitCode::from(code)
}
