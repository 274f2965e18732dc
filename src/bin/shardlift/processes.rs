//! This process among those of the other ranks: which rank it is, and how they load together.

use std::sync::Arc;

use shardlift::{Error, ErrorKind, Group, GroupOptions, Launch, LaunchOptions, Rank, Result, Sharing};

use crate::args::{CooperateChoice, Devices, LoadArgs, ProcessArgs};
use crate::interrupt::Interrupt;
use crate::model;
use crate::output::Failure;

/// Which rank this process drives, where it is not all of them.
pub(crate) fn launch(args: &LoadArgs, ranks: u32) -> Result<Option<Launch>> {
    let ProcessArgs { rendezvous, session, node, .. } = &args.processes;
    let mut options = LaunchOptions::default();
    options.rank = args.rank.map(Rank);
    options.size = args.rank.map(|_| ranks);
    options.rendezvous = rendezvous.clone();
    options.session = session.clone();
    options.node = node.clone();
    let Some(launch) = Launch::from_env(&options)? else {
        return match rendezvous {
            None => Ok(None),
            Some(_) => Err(Error::new(ErrorKind::Usage, "--rendezvous without --rank or a launcher")),
        };
    };
    match launch.size() {
        // A launcher of one process, which drives all ranks, has nothing to say here.
        1 if args.rank.is_none() => Ok(None),
        size if size == ranks => Ok(Some(launch)),
        size => Err(Error::new(ErrorKind::Usage, "the mesh has another number of ranks than there are processes")
            .with_expected(format!("{size} ranks ({})", launch.launcher()), format!("{ranks} ranks"))),
    }
}

/// The GPU of this rank, where flags do not say it and the launcher does.
pub(crate) fn devices(args: &LoadArgs, launch: Option<&Launch>) -> Result<Devices> {
    match (&args.devices, launch) {
        (Devices::Cuda(gpus), Some(launch)) if gpus.is_empty() && launch.local_rank().is_some() => {
            Ok(Devices::Cuda(vec![launch.gpu(model::visible_gpus())?]))
        }
        (devices, _) => Ok(devices.clone()),
    }
}

/// Meets the processes of the other ranks, where they load together: asked to, or on GPUs that a launcher has given out.
pub(crate) fn join(
    args: &LoadArgs,
    launch: Option<&Launch>,
    interrupt: &Interrupt,
) -> Result<Option<Arc<Group>>, Failure> {
    let ProcessArgs { cooperate, rendezvous, join_timeout, fail_timeout, .. } = &args.processes;
    let on_gpus = matches!(args.devices, Devices::Cuda(_));
    let Some(launch) = launch else { return Ok(None) };
    let cooperates = match cooperate {
        CooperateChoice::Never => false,
        CooperateChoice::Auto => on_gpus && launch.launcher() != "flags",
        CooperateChoice::Always | CooperateChoice::Cluster => on_gpus,
    };
    if !cooperates && rendezvous.is_none() {
        return Ok(None);
    }
    let mut options = GroupOptions::default();
    options.join_timeout = join_timeout.unwrap_or(options.join_timeout);
    options.fail_timeout = fail_timeout.unwrap_or(options.fail_timeout);
    interrupt.waits();
    let joined = Group::join_unless(launch, &options, &|| interrupt.signal().is_some());
    let group = joined.map_err(|error| Failure::from(error).with_signal(interrupt.signal()))?;
    Ok(Some(Arc::new(group)))
}

/// What the ranks share of their reading.
pub(crate) fn sharing(cooperate: CooperateChoice) -> Sharing {
    match cooperate {
        CooperateChoice::Auto => Sharing::Auto,
        CooperateChoice::Always => Sharing::Node,
        CooperateChoice::Cluster => Sharing::Cluster,
        CooperateChoice::Never => Sharing::Never,
    }
}

/// What came of this rank's load, told to the others: nobody is done before all are.
pub(crate) fn settle<T>(group: &Group, loaded: Result<T, Failure>, interrupt: &Interrupt) -> Result<T, Failure> {
    match loaded {
        Ok(loaded) => {
            let failed = |error| Failure::started(error).with_signal(interrupt.signal());
            group.finish().map(|()| loaded).map_err(failed)
        }
        Err(failure) => {
            group.fail(failure.error());
            Err(failure)
        }
    }
}
