//! The command line: `shardlift inspect|verify|plan|load|reshard|doctor`.

mod args;
mod doctor;
mod inspect;
mod interrupt;
mod load;
mod model;
mod output;
mod plan;
mod processes;
mod rates;
mod reshard;
mod verify;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use clap::Parser;
use shardlift::{Error, ErrorKind};

use args::{Cli, Command};
use interrupt::Interrupt;
use output::{Answer, Failure, Output};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(error),
    };
    let (name, json) = cli.command.name_and_json();
    if json {
        output::keep_stdout();
    }
    let mut output = Output::new(name, json);
    let interrupt = match Interrupt::install(name, json) {
        Ok(interrupt) => interrupt,
        Err(error) => return ExitCode::from(output.finish(Err(Failure::from(error)))),
    };
    let result = catch_unwind(AssertUnwindSafe(|| {
        let fields = match &cli.command {
            Command::Inspect(args) => inspect::run(args, &mut output),
            Command::Verify(args) => verify::run(args, &mut output),
            Command::Plan(args) => return plan::run(args, &mut output),
            Command::Load(args) => load::run(args, &mut output, &interrupt),
            Command::Reshard(args) => reshard::run(args, &mut output, &interrupt),
            Command::Doctor(args) => doctor::run(args, &mut output),
        };
        fields.map(Answer::Fields)
    }));
    let result = result.unwrap_or_else(|panic| {
        let what = panic.downcast_ref::<&str>().map(|text| text.to_string());
        let what = what.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
        Err(Failure::from(Error::new(ErrorKind::Panicked, format!("bug in shardlift: {what}"))))
    });
    interrupt.ends();
    ExitCode::from(output.finish(result))
}

/// A command line that does not parse: help and version succeed, everything else is a usage error.
fn usage(error: clap::Error) -> ExitCode {
    use clap::error::ErrorKind as Clap;

    let words: Vec<String> = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    let json = words.iter().take_while(|word| *word != "--").any(|word| word == "--json");
    if !error.use_stderr() || !json {
        let status = if matches!(error.kind(), Clap::DisplayHelp | Clap::DisplayVersion) { 0 } else { 2 };
        return match error.print() {
            Ok(()) => ExitCode::from(status),
            Err(_) => ExitCode::from(status.max(1)),
        };
    }
    let command = words.iter().find_map(|word| Command::known(word)).unwrap_or("");
    let text = error.to_string();
    // The first paragraph is the error; usage and hints follow.
    let lines: Vec<&str> = text.lines().take_while(|line| !line.trim().is_empty()).map(str::trim).collect();
    let message = lines.join(" ");
    let message = message.strip_prefix("error: ").unwrap_or(&message);
    let failure = Failure::from(Error::new(ErrorKind::Usage, message));
    ExitCode::from(Output::new(command, true).finish(Err(failure)))
}
