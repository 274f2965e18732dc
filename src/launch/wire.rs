//! What travels on a control connection: frames of a length, a tag and fields, little-endian. Lengths are bounded before
//! anything is kept of what they promise.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::failure::{Failure, Missing};
use super::shared::Kind;
use crate::error::{At, ErrorKind};
use crate::extent::Rank;
use crate::limits;

/// The first bytes of both sides, so that no other protocol is taken for this one; the last byte is its version.
const MAGIC: [u8; 8] = *b"shrdlft\x01";

/// Bytes of a frame's length.
pub(super) const HEAD: usize = 4;

/// What a rank says when it connects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hello {
    pub(super) session: String,
    pub(super) rank: Rank,
    pub(super) size: u32,
    /// Of this attempt to join: a rank that connects again is known by it.
    pub(super) nonce: u64,
    pub(super) fail_timeout: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Message {
    /// Rank to hub, first of all.
    Hello(Hello),
    /// Hub to rank: this is the hub of that session.
    Welcome { session: String },
    /// Hub to whoever spoke of another session.
    OtherSession,
    /// Hub to rank: who has not come yet.
    Missing(Missing),
    /// Hub to rank: all are there.
    Joined,
    /// Both ways: somebody is alive.
    Beat,
    /// Rank to hub: its part of the next exchange, or, as the last one, of the end.
    Offer { step: u32, kind: Kind, what: String, part: Vec<u8> },
    /// Hub to rank: everybody's parts, in the order of ranks.
    Gathered { step: u32, parts: Vec<Vec<u8>> },
    /// Both ways: the group has failed.
    Failed(Failure),
    /// Rank to hub, and hub to rank: leaves without having failed. After the end this is what is expected.
    Leave,
}

/// A frame that no rank of this version sends.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Malformed;

impl Message {
    /// The whole frame.
    pub(super) fn frame(&self) -> Vec<u8> {
        let mut frame = Frame(vec![0; HEAD]);
        match self {
            Message::Hello(Hello { session, rank, size, nonce, fail_timeout }) => {
                frame.byte(1).bytes(&MAGIC).text(session).u32(rank.0).u32(*size).u64(*nonce);
                frame.u64(u64::try_from(fail_timeout.as_millis()).unwrap_or(u64::MAX));
            }
            Message::Welcome { session } => {
                frame.byte(2).bytes(&MAGIC).text(session);
            }
            Message::OtherSession => {
                frame.byte(3).bytes(&MAGIC);
            }
            Message::Missing(Missing { count, runs }) => {
                frame.byte(4).u32(*count).u32(runs.len() as u32);
                runs.iter().for_each(|(first, last)| {
                    frame.u32(*first).u32(*last);
                });
            }
            Message::Joined => {
                frame.byte(5);
            }
            Message::Beat => {
                frame.byte(6);
            }
            Message::Offer { step, kind, what, part } => {
                frame.byte(7).u32(*step).byte(*kind as u8).text(what).block(part);
            }
            Message::Gathered { step, parts } => {
                frame.byte(8).u32(*step).u32(parts.len() as u32);
                parts.iter().for_each(|part| {
                    frame.block(part);
                });
            }
            Message::Failed(failure) => frame.byte(9).failure(failure),
            Message::Leave => {
                frame.byte(10);
            }
        }
        frame.done()
    }

    /// The message of a frame without its length.
    pub(super) fn parse(body: &[u8]) -> Result<Message, Malformed> {
        let mut fields = Fields(body);
        let message = match fields.byte()? {
            1 => {
                fields.magic()?;
                let (session, rank, size) = (fields.text()?, Rank(fields.u32()?), fields.u32()?);
                let (nonce, fail_timeout) = (fields.u64()?, Duration::from_millis(fields.u64()?));
                Message::Hello(Hello { session, rank, size, nonce, fail_timeout })
            }
            2 => {
                fields.magic()?;
                Message::Welcome { session: fields.text()? }
            }
            3 => {
                fields.magic()?;
                Message::OtherSession
            }
            4 => {
                let (count, runs) = (fields.u32()?, fields.u32()?);
                if runs as usize > limits::MISSING_SHOWN {
                    return Err(Malformed);
                }
                let run = |_| {
                    let (first, last) = (fields.u32()?, fields.u32()?);
                    if first > last || last >= limits::RANKS_MAX { Err(Malformed) } else { Ok((first, last)) }
                };
                Message::Missing(Missing { count, runs: (0..runs).map(run).collect::<Result<_, _>>()? })
            }
            5 => Message::Joined,
            6 => Message::Beat,
            7 => Message::Offer {
                step: fields.u32()?,
                kind: match fields.byte()? {
                    0 => Kind::Exchange,
                    1 => Kind::Barrier,
                    2 => Kind::End,
                    _ => return Err(Malformed),
                },
                what: fields.text()?,
                part: fields.block()?.to_vec(),
            },
            8 => {
                let (step, count) = (fields.u32()?, fields.u32()?);
                if count > limits::RANKS_MAX {
                    return Err(Malformed);
                }
                let part = |_| fields.block().map(<[u8]>::to_vec);
                Message::Gathered { step, parts: (0..count).map(part).collect::<Result<_, _>>()? }
            }
            9 => Message::Failed(fields.failure()?),
            10 => Message::Leave,
            _ => return Err(Malformed),
        };
        if fields.0.is_empty() { Ok(message) } else { Err(Malformed) }
    }
}

/// A frame in the making.
struct Frame(Vec<u8>);

impl Frame {
    fn bytes(&mut self, bytes: &[u8]) -> &mut Frame {
        self.0.extend_from_slice(bytes);
        self
    }

    fn byte(&mut self, byte: u8) -> &mut Frame {
        self.bytes(&[byte])
    }

    fn u32(&mut self, number: u32) -> &mut Frame {
        self.bytes(&number.to_le_bytes())
    }

    fn u64(&mut self, number: u64) -> &mut Frame {
        self.bytes(&number.to_le_bytes())
    }

    /// Bytes behind their number. What is longer than a frame was refused before.
    fn block(&mut self, bytes: &[u8]) -> &mut Frame {
        self.u32(u32::try_from(bytes.len()).expect("bug in shardlift: a part longer than a frame")).bytes(bytes)
    }

    /// Text, cut where it is longer than anybody reads.
    fn text(&mut self, text: &str) -> &mut Frame {
        let end = text.floor_char_boundary(limits::CONTROL_TEXT);
        self.block(&text.as_bytes()[..end])
    }

    fn optional(&mut self, text: Option<&str>) -> &mut Frame {
        match text {
            Some(text) => self.byte(1).text(text),
            None => self.byte(0),
        }
    }

    fn failure(&mut self, failure: &Failure) {
        let Failure { said, kind, message, expected, found, at } = failure;
        let At { file, tensor, bytes, rank } = at;
        self.byte(u8::from(*said)).text(kind.name()).text(message);
        self.optional(expected.as_deref()).optional(found.as_deref());
        self.optional(file.as_deref().map(Path::to_string_lossy).as_deref()).optional(tensor.as_deref());
        match bytes {
            Some((from, to)) => self.byte(1).u64(*from).u64(*to),
            None => self.byte(0),
        };
        match rank {
            Some(rank) => self.byte(1).u32(rank.0),
            None => self.byte(0),
        };
    }

    fn done(mut self) -> Vec<u8> {
        let length = u32::try_from(self.0.len() - HEAD).expect("bug in shardlift: a frame of 4 GiB");
        self.0[..HEAD].copy_from_slice(&length.to_le_bytes());
        self.0
    }
}

/// What is left of a frame.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(Malformed)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(Malformed)?;
        self.0 = rest;
        Ok(*taken)
    }

    fn magic(&mut self) -> Result<(), Malformed> {
        if self.array()? == MAGIC { Ok(()) } else { Err(Malformed) }
    }

    fn byte(&mut self) -> Result<u8, Malformed> {
        self.array().map(|[byte]| byte)
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_le_bytes)
    }

    fn block(&mut self) -> Result<&'a [u8], Malformed> {
        let length = self.u32()?;
        self.take(length as usize)
    }

    fn text(&mut self) -> Result<String, Malformed> {
        let bytes = self.block()?;
        if bytes.len() > limits::CONTROL_TEXT {
            return Err(Malformed);
        }
        std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| Malformed)
    }

    fn optional<T>(&mut self, read: impl FnOnce(&mut Self) -> Result<T, Malformed>) -> Result<Option<T>, Malformed> {
        match self.byte()? {
            0 => Ok(None),
            1 => read(self).map(Some),
            _ => Err(Malformed),
        }
    }

    fn failure(&mut self) -> Result<Failure, Malformed> {
        let (said, kind) = (self.byte()? != 0, self.text()?);
        let kind = ErrorKind::named(&kind).ok_or(Malformed)?;
        let message = self.text()?;
        let (expected, found) = (self.optional(Self::text)?, self.optional(Self::text)?);
        let (file, tensor) = (self.optional(Self::text)?.map(PathBuf::from), self.optional(Self::text)?);
        let bytes = self.optional(|fields| Ok((fields.u64()?, fields.u64()?)))?;
        let rank = self.optional(Self::u32)?.map(Rank);
        Ok(Failure { said, kind, message, expected, found, at: At { file, tensor, bytes, rank } })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages() -> Vec<Message> {
        let failure = Failure {
            said: true,
            kind: ErrorKind::DeviceMemory,
            message: "too little".into(),
            expected: Some("2".into()),
            found: None,
            at: At {
                file: Some("/a".into()),
                tensor: Some("w".into()),
                bytes: Some((1, u64::MAX)),
                rank: Some(Rank(7)),
            },
        };
        let hello = Hello {
            session: "s".into(),
            rank: Rank(3),
            size: 4,
            nonce: u64::MAX,
            fail_timeout: Duration::from_millis(1500),
        };
        vec![
            Message::Hello(hello),
            Message::Welcome { session: "ü".into() },
            Message::OtherSession,
            Message::Missing(Missing::of([1, 2, 5])),
            Message::Joined,
            Message::Beat,
            Message::Offer { step: 9, kind: Kind::Barrier, what: "x".into(), part: vec![1, 2] },
            Message::Gathered { step: 9, parts: vec![vec![], vec![1], vec![2; 300]] },
            Message::Failed(failure),
            Message::Failed(Failure::of(None, ErrorKind::Cancelled, "c")),
            Message::Leave,
        ]
    }

    #[test]
    fn what_is_sent_is_what_is_read() {
        for message in messages() {
            let frame = message.frame();
            assert_eq!(frame[..HEAD], ((frame.len() - HEAD) as u32).to_le_bytes());
            assert_eq!(Message::parse(&frame[HEAD..]), Ok(message));
        }
    }

    #[test]
    fn cut_and_changed_frames_are_refused_or_read_but_never_a_panic() {
        for message in messages() {
            let frame = message.frame();
            let body = &frame[HEAD..];
            for end in 0..body.len() {
                assert_eq!(Message::parse(&body[..end]), Err(Malformed), "{message:?} cut at {end}");
            }
            assert_eq!(Message::parse(&[body, &[0]].concat()), Err(Malformed), "{message:?} and a byte");
            for at in 0..body.len() {
                for value in [0, 1, 0x7f, 0x80, 0xff] {
                    let mut changed = body.to_vec();
                    changed[at] = value;
                    let _ = Message::parse(&changed);
                }
            }
        }
    }

    #[test]
    fn long_text_is_cut_at_a_character() {
        let long = "ü".repeat(limits::CONTROL_TEXT);
        let frame = Message::Failed(Failure::of(None, ErrorKind::Io, long)).frame();
        let Ok(Message::Failed(failure)) = Message::parse(&frame[HEAD..]) else { panic!("no failure") };
        assert_eq!(failure.message.len(), limits::CONTROL_TEXT);
    }
}
