//! Builds the default guest image: `build-image <data dir> <clan executable> <agent executable>`. Prints the image's id.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "this is a command")]

use std::{env, error::Error, path::PathBuf, time::Instant};

use clan_build::{Builder, ImageStore, Recipe};
use tokio_util::sync::CancellationToken;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<PathBuf> = env::args_os().skip(1).map(PathBuf::from).collect();
    let [data, clan, agent] = args.as_slice() else {
        return Err("usage: build-image <data dir> <clan executable> <agent executable>".into());
    };
    let store = ImageStore::open(data.join("images"))?;
    let builder = Builder { cache_dir: data.join("cache"), store, proxy: None, mirror: None };
    let cancel = CancellationToken::new();
    let on_signal = cancel.clone();
    tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            on_signal.cancel();
        }
    });
    let started = Instant::now();
    let mut last = None;
    let progress = |p: clan_build::Progress| {
        let now = (p.step, p.fraction.map(|f| (f * 100.0) as u32));
        if last != Some(now) {
            eprintln!(
                "{:6.1} s {:3} % {:24} {}",
                started.elapsed().as_secs_f32(),
                now.1.unwrap_or_default(),
                p.step,
                p.line.unwrap_or_default()
            );
            last = Some(now);
        }
    };
    let id = builder.build(&Recipe::default_debian(clan, agent), progress, cancel).await?;
    println!("{id}");
    Ok(())
}
