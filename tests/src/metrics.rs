//! Reading a server's figures as Prometheus would.

use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::process::Child;

/// Everything that a server's operations listener says under `/metrics`.
#[derive(Debug, Clone)]
pub struct Figures(String);

impl Figures {
    /// Asks a running server.
    ///
    /// # Errors
    /// When it does not answer within five seconds.
    pub async fn of(server: &Child) -> Result<Self> {
        let figures = Self::at(server.address("ops")).await;
        figures.with_context(|| format!("{} has no figures", server.name))
    }

    /// Asks an operations listener at an address.
    ///
    /// # Errors
    /// When it does not answer within five seconds.
    pub async fn at(address: &str) -> Result<Self> {
        let ask = async {
            let mut stream = TcpStream::connect(address).await?;
            let head = format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
            stream.write_all(head.as_bytes()).await?;
            let mut text = String::new();
            stream.read_to_string(&mut text).await?;
            anyhow::Ok(text)
        };
        let text = tokio::time::timeout(Duration::from_secs(5), ask).await;
        let text = text.with_context(|| format!("no figures from {address}"))??;
        anyhow::ensure!(text.starts_with("HTTP/1.1 200"), "{text:.200}");
        Ok(Self(text))
    }

    /// The sum of all lines of a figure, whatever their labels; 0 when there is none.
    #[must_use]
    pub fn sum(&self, name: &str) -> f64 {
        self.lines(name)
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    }

    /// The lines of a figure, for messages.
    pub fn lines<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0
            .lines()
            .filter(move |line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{'])))
    }
}
