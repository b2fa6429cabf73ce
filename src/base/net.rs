//! Bounded listeners: no more connections at a time than told, each of them watched for silence where told.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};

/// Keeps up to so many connections at a time. Further ones are closed at once, so that who connects learns it now and
/// not from a time-out.
pub struct BoundedListener {
    listener: TcpListener,
    places: Arc<Semaphore>,
    silence_max: Option<Duration>,
    open_gauge: metrics::Gauge,
    refused_counter: metrics::Counter,
}

impl BoundedListener {
    /// Listens on `address` (port 0: any free one).
    pub async fn bind(address: SocketAddr, connections_max: usize) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let places = Arc::new(Semaphore::new(connections_max.min(Semaphore::MAX_PERMITS)));
        Ok(Self {
            listener,
            places,
            silence_max: None,
            open_gauge: metrics::Gauge::noop(),
            refused_counter: metrics::Counter::noop(),
        })
    }

    /// Closes connections on which nothing was sent or received for so long.
    pub fn silence_max(mut self, silence_max: Duration) -> Self {
        self.silence_max = Some(silence_max);
        self
    }

    /// Reports the connections open now, and those closed because there was no place.
    pub fn metrics(mut self, open: metrics::Gauge, refused: metrics::Counter) -> Self {
        open.set(0.0);
        self.open_gauge = open;
        self.refused_counter = refused;
        self
    }

    /// The address in use.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Waits for a connection for which there is a place. Errors of accepting are logged and outlived: a machine that
    /// is out of file descriptors now may have some later. May be cancelled.
    pub async fn accept(&self) -> (Connection, SocketAddr) {
        loop {
            match self.listener.accept().await {
                Ok((stream, peer)) => {
                    let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else {
                        self.refused_counter.increment(1);
                        tracing::debug!(%peer, "connection refused: as many as allowed are open");
                        continue;
                    };
                    if let Err(error) = stream.set_nodelay(true) {
                        tracing::debug!(%error, %peer, "cannot switch off Nagle's algorithm");
                    }
                    self.open_gauge.increment(1.0);
                    let silence = self.silence_max.map(|max| Silence {
                        max,
                        sleep: Box::pin(tokio::time::sleep(max)),
                    });
                    let held = Held {
                        _place: place,
                        open_gauge: self.open_gauge.clone(),
                    };
                    return (
                        Connection {
                            stream,
                            silence,
                            _held: held,
                        },
                        peer,
                    );
                }
                Err(error) if is_of_one_connection(&error) => {}
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

fn is_of_one_connection(error: &io::Error) -> bool {
    [
        io::ErrorKind::ConnectionAborted,
        io::ErrorKind::ConnectionReset,
        io::ErrorKind::ConnectionRefused,
    ]
    .contains(&error.kind())
}

/// A connection that holds its place in the listener's bound until it is dropped.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    silence: Option<Silence>,
    _held: Held,
}

#[derive(Debug)]
struct Silence {
    max: Duration,
    sleep: Pin<Box<Sleep>>,
}

#[derive(Debug)]
struct Held {
    _place: OwnedSemaphorePermit,
    open_gauge: metrics::Gauge,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.open_gauge.decrement(1.0);
    }
}

impl Connection {
    /// This side's address.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.stream.local_addr().ok()
    }

    /// The other side's address.
    pub fn peer_addr(&self) -> Option<SocketAddr> {
        self.stream.peer_addr().ok()
    }

    /// Something moved, or nothing did: then ready with an error if that has lasted too long.
    fn watch<T>(&mut self, cx: &mut Context<'_>, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        let Some(silence) = &mut self.silence else {
            return polled;
        };
        if polled.is_ready() {
            silence.sleep.as_mut().reset(Instant::now() + silence.max);
            return polled;
        }
        match silence.sleep.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        self.watch(cx, polled)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.watch(cx, polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.watch(cx, polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn any() -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 0))
    }

    #[tokio::test]
    async fn no_more_connections_than_places() {
        let listener = BoundedListener::bind(any(), 1).await.unwrap();
        let address = listener.local_addr().unwrap();
        let _one = TcpStream::connect(address).await.unwrap();
        let (first, _) = listener.accept().await;
        let mut two = TcpStream::connect(address).await.unwrap();
        let refused = async {
            let end = two.read(&mut [0; 1]).await;
            assert!(matches!(end, Ok(0) | Err(_)), "the second is closed at once");
        };
        tokio::select! {
            () = refused => {}
            _ = listener.accept() => panic!("there is no place for a second one"),
        }
        drop(first);
        let mut three = TcpStream::connect(address).await.unwrap();
        let (mut third, peer) = listener.accept().await;
        assert_eq!(peer, three.local_addr().unwrap());
        third.write_all(b"hi").await.unwrap();
        let mut got = [0; 2];
        three.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"hi");
    }

    #[tokio::test]
    async fn a_silent_connection_is_given_up() {
        let listener = BoundedListener::bind(any(), 1)
            .await
            .unwrap()
            .silence_max(Duration::from_millis(20));
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut server, _) = listener.accept().await;
        client.write_all(b"x").await.unwrap();
        let mut got = [0; 1];
        server.read_exact(&mut got).await.unwrap();
        let error = server.read_exact(&mut got).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
