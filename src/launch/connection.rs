//! One control connection: a socket that never blocks, frames that arrive in pieces, and what still waits to be sent.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use super::wire::{HEAD, Malformed, Message};
use crate::limits;

#[derive(Debug)]
pub(super) struct Connection {
    stream: TcpStream,
    received: Vec<u8>,
    /// Bytes of `received` that were parsed.
    parsed: usize,
    /// Longest frame that the other side may send now.
    longest: usize,
    queue: VecDeque<Arc<[u8]>>,
    /// Bytes of the queue's first frame that were sent.
    sent: usize,
    /// Whether more may come.
    open: bool,
    /// When anything came last.
    heard: Instant,
    /// Whether there may be something to read.
    ready: bool,
}

impl Connection {
    /// A connection with somebody who may say nothing longer than [`limits::HELLO_MAX`] until [`trust`](Connection::trust).
    pub(super) fn new(stream: TcpStream) -> io::Result<Connection> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        Ok(Connection {
            stream,
            received: Vec::new(),
            parsed: 0,
            longest: limits::HELLO_MAX,
            queue: VecDeque::new(),
            sent: 0,
            open: true,
            heard: Instant::now(),
            ready: true,
        })
    }

    /// From now on the other side may send frames up to this length.
    pub(super) fn trust(&mut self, longest: usize) {
        self.longest = longest;
    }

    pub(super) fn send(&mut self, message: &Message) {
        self.send_frame(message.frame().into());
    }

    /// Sends a frame that others get, too.
    pub(super) fn send_frame(&mut self, frame: Arc<[u8]>) {
        self.queue.push_back(frame);
        self.flush();
    }

    /// Sends what the socket takes. What cannot be sent any more is dropped; the last words of the other side may still be
    /// read.
    pub(super) fn flush(&mut self) {
        while let Some(frame) = self.queue.front() {
            match self.stream.write(&frame[self.sent..]) {
                Ok(count) if self.sent + count == frame.len() => {
                    self.sent = 0;
                    self.queue.pop_front();
                }
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.queue.clear();
                    self.sent = 0;
                }
            }
        }
    }

    /// Whether all was handed to the socket.
    pub(super) fn is_flushed(&self) -> bool {
        self.queue.is_empty()
    }

    /// Reads what is there, as much as one turn should take.
    pub(super) fn receive(&mut self, now: Instant) {
        let mut buffer = [0; READ];
        for _ in 0..READS {
            match self.stream.read(&mut buffer) {
                Ok(0) => {
                    self.open = false;
                    return;
                }
                Ok(count) => {
                    self.heard = now;
                    self.received.extend_from_slice(&buffer[..count]);
                    // So that a stranger who goes on and on is not kept.
                    if self.received.len() - self.parsed > self.longest + HEAD {
                        return;
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.open = false;
                    return;
                }
            }
        }
    }

    /// The next whole message of what was received.
    pub(super) fn next(&mut self) -> Result<Option<Message>, Malformed> {
        let rest = &self.received[self.parsed..];
        let Some((head, body)) = rest.split_first_chunk::<HEAD>() else {
            self.forget_parsed();
            return Ok(None);
        };
        let length = u32::from_le_bytes(*head) as usize;
        if length > self.longest {
            return Err(Malformed);
        }
        match body.get(..length) {
            Some(body) => {
                let message = Message::parse(body)?;
                self.parsed += HEAD + length;
                Ok(Some(message))
            }
            None => {
                self.forget_parsed();
                Ok(None)
            }
        }
    }

    fn forget_parsed(&mut self) {
        self.received.drain(..self.parsed);
        self.parsed = 0;
    }

    /// Reads and forgets; for a side that has said all.
    pub(super) fn discard(&mut self, now: Instant) {
        self.receive(now);
        self.received.clear();
        self.parsed = 0;
    }

    /// Tells the other side that nothing more comes, once all was sent.
    pub(super) fn end(&mut self) {
        // It fails where the connection is no more, and then the other side knows.
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// Whether more may come from the other side.
    pub(super) fn is_open(&self) -> bool {
        self.open
    }

    pub(super) fn heard(&self) -> Instant {
        self.heard
    }

    /// Counts silence from now on: before, this side did not listen.
    pub(super) fn forgive(&mut self, now: Instant) {
        self.heard = now;
    }

    pub(super) fn is_ready(&self) -> bool {
        self.ready
    }

    pub(super) fn set_ready(&mut self, ready: bool) {
        self.ready = ready;
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Bytes of one read: more than any message but those of an exchange.
const READ: usize = 16 << 10;

/// Reads of one turn, so that a long message holds nobody else up.
const READS: usize = 16;

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn what_cannot_be_sent_any_more_is_forgotten_as_a_whole() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (other, _) = listener.accept().unwrap();
        let mut connection = Connection::new(stream).unwrap();
        // More than sockets keep: some of it has been sent.
        connection.send_frame(vec![0; 64 << 20].into());
        assert!(!connection.is_flushed() && connection.sent > 0);
        drop(other); // with something unread
        while !connection.is_flushed() {
            connection.flush();
            std::thread::yield_now();
        }
        connection.send(&Message::Beat);
        assert!(connection.is_flushed());
    }
}
