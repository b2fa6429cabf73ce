//! A TCP proxy in front of a peer listener, that can be made to stall: it accepts, and reads nothing any more.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

pub struct Proxy {
    pub address: String,
    stalled: watch::Sender<bool>,
    pub connections: Arc<AtomicU64>,
}

impl Proxy {
    pub async fn new(target: String) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let stalled = watch::Sender::new(false);
        let connections = Arc::new(AtomicU64::new(0));
        let (count, flag) = (connections.clone(), stalled.clone());
        tokio::spawn(async move {
            while let Ok((inside, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::Relaxed);
                let (target, flag) = (target.clone(), flag.subscribe());
                tokio::spawn(async move {
                    let Ok(outside) = TcpStream::connect(target).await else {
                        return;
                    };
                    let (from_inside, to_inside) = inside.into_split();
                    let (from_outside, to_outside) = outside.into_split();
                    tokio::spawn(copy(from_inside, to_outside, flag.clone()));
                    tokio::spawn(copy(from_outside, to_inside, flag));
                });
            }
        });
        Proxy {
            address,
            stalled,
            connections,
        }
    }

    pub fn stall(&self, stalled: bool) {
        self.stalled.send_replace(stalled);
    }
}

async fn copy(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut stalled: watch::Receiver<bool>,
) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        if stalled.wait_for(|stalled| !stalled).await.is_err() {
            return;
        }
        match from.read(&mut buffer).await {
            Ok(n) if n > 0 && to.write_all(&buffer[..n]).await.is_ok() => {}
            Ok(_) | Err(_) => return,
        }
    }
}
