//! The command line: `shardlift inspect|verify|plan|load|reshard|doctor`.

fn main() {}
