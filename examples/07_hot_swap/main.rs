//! A server of embeddings that changes its model while it answers: the new one is loaded beside the old one, takes over
//! between two requests, and the old one's memory is given back when its last request is answered. A load that fails, is
//! cancelled, or would need more memory than the budget leaves the old one in its place.
//!
//! `cargo run --release --features examples --example 07_hot_swap -- MODEL [--listen ADDRESS] [--budget MB] [--throttle MB]`
//!
//! MODEL is a folder like that of all-MiniLM-L6-v2, which `scripts/demo` fetches into `.cache/demo`. The budget is for the weights
//! of all models, in megabytes; the throttle is what a load may read of them in a second.
//!
//! ```text
//! curl -d '{"sentences": ["A crane lifts a container."]}' -H 'content-type: application/json' ADDRESS/embed
//! curl -d '{"model": "OTHER"}' -H 'content-type: application/json' ADDRESS/swap
//! curl -X POST ADDRESS/cancel
//! curl ADDRESS/status ; curl ADDRESS/metrics
//! ```

#[path = "../embedder/mod.rs"]
mod embedder;
mod metrics;
mod models;

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use models::{Failure, Models};
use serde::Deserialize;
use serde_json::json;
use tokio::net::TcpListener;

const USAGE: &str = "usage: 07_hot_swap MODEL [--listen ADDRESS] [--budget MB] [--throttle MB]";

/// An error of something other than a load.
type BoxError = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let mut words = std::env::args().skip(1);
    let model = PathBuf::from(words.next().ok_or(USAGE)?);
    let (mut listen, mut budget, mut throttle) = ("127.0.0.1:8080".to_owned(), u64::MAX, None);
    while let Some(option) = words.next() {
        let value = words.next().ok_or(USAGE)?;
        let bytes = || value.parse::<u64>().map(|megabytes| megabytes.saturating_mul(1_000_000));
        match option.as_str() {
            "--listen" => listen = value,
            "--budget" => budget = bytes()?,
            "--throttle" => throttle = Some(bytes()?),
            _ => return Err(USAGE.into()),
        }
    }
    let models = Arc::new(Models::new(budget, throttle));
    models.swap(&model).await.map_err(|failure| failure.to_string())?;
    let router = Router::new()
        .route("/embed", post(embed))
        .route("/swap", post(swap))
        .route("/cancel", post(cancel))
        .route("/status", get(status))
        .route("/metrics", get(metrics))
        .with_state(models);
    let listener = TcpListener::bind(listen).await?;
    writeln!(io::stdout(), "listening on {}", listener.local_addr()?)?;
    axum::serve(listener, router).await?;
    Ok(())
}

#[derive(Deserialize)]
struct Sentences {
    sentences: Vec<String>,
}

#[derive(Deserialize)]
struct Model {
    model: PathBuf,
}

async fn embed(State(models): State<Arc<Models>>, Json(Sentences { sentences }): Json<Sentences>) -> Response {
    // The model that is there now answers, even if another one is there before it is done.
    let Some(serving) = models.serving() else { return StatusCode::SERVICE_UNAVAILABLE.into_response() };
    let embedded = tokio::task::spawn_blocking(move || {
        let vectors = serving.embedder.embed(&sentences).map_err(|error| error.to_string())?;
        Ok::<_, String>(json!({ "model": serving.name, "vectors": vectors }))
    });
    match embedded.await.map_err(|error| error.to_string()).and_then(|embedded| embedded) {
        Ok(answer) => Json(answer).into_response(),
        Err(why) => (StatusCode::INTERNAL_SERVER_ERROR, Json(json!({ "error": why }))).into_response(),
    }
}

async fn swap(State(models): State<Arc<Models>>, Json(Model { model }): Json<Model>) -> Response {
    // In a task of its own: it goes on if the client goes away.
    let swapped = tokio::spawn(async move { models.swap(&model).await }).await;
    match swapped.unwrap_or_else(|error| Err(Failure::Model(error.to_string()))) {
        Ok(swapped) => Json(swapped).into_response(),
        Err(failure) => {
            let status = match &failure {
                Failure::Busy => StatusCode::CONFLICT,
                Failure::Budget { .. } => StatusCode::INSUFFICIENT_STORAGE,
                Failure::Load(_) | Failure::Cancelled | Failure::Model(_) => StatusCode::UNPROCESSABLE_ENTITY,
            };
            (status, Json(json!({ "error": failure.to_string() }))).into_response()
        }
    }
}

async fn cancel(State(models): State<Arc<Models>>) -> Response {
    Json(json!({ "cancelled": models.cancel() })).into_response()
}

async fn status(State(models): State<Arc<Models>>) -> Response {
    Json(models.status()).into_response()
}

async fn metrics(State(models): State<Arc<Models>>) -> Response {
    ([("content-type", "text/plain; version=0.0.4")], models.metrics()).into_response()
}
