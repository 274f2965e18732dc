//! Handles: an index, a generation and a type, never an address.

use crate::code::{Code, INVALID_HANDLE};

/// What the caller holds of a context, stream, event and so on.
pub type Handle = u64;

/// The top half-word of every handle: no address has it, so one that is followed faults.
const MARK: u64 = 0x5C;

/// What a handle stands for; part of its value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Context = 1,
    Stream,
    Event,
    Module,
    Function,
    Physical,
    Pool,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Context => "context",
            Kind::Stream => "stream",
            Kind::Event => "event",
            Kind::Module => "module",
            Kind::Function => "function",
            Kind::Physical => "physical allocation",
            Kind::Pool => "memory pool",
        }
    }
}

/// Why a handle names nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Missing {
    /// Not a handle of this type, and never was.
    Wrong,
    /// It was destroyed.
    Stale,
}

/// The objects of one type.
pub(crate) struct Table<T> {
    kind: Kind,
    slots: Vec<Slot<T>>,
    free: Vec<usize>,
}

struct Slot<T> {
    generation: u64,
    /// With the number of the call that made it.
    entry: Option<(u64, T)>,
}

impl<T> Table<T> {
    pub(crate) fn new(kind: Kind) -> Table<T> {
        Table { kind, slots: Vec::new(), free: Vec::new() }
    }

    pub(crate) fn insert(&mut self, made: u64, value: T) -> Handle {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { generation: 0, entry: None });
            self.slots.len() - 1
        });
        let slot = &mut self.slots[index];
        slot.entry = Some((made, value));
        self.handle(index)
    }

    fn handle(&self, index: usize) -> Handle {
        MARK << 56 | (self.kind as u64) << 48 | (self.slots[index].generation & 0xff_ffff) << 24 | (index as u64 + 1)
    }

    fn index(&self, handle: Handle) -> Result<usize, Missing> {
        let index = (handle & 0xff_ffff).wrapping_sub(1) as usize;
        if handle >> 48 != MARK << 8 | self.kind as u64 || index >= self.slots.len() {
            return Err(Missing::Wrong);
        }
        if self.slots[index].entry.is_none() || self.handle(index) != handle {
            return Err(Missing::Stale);
        }
        Ok(index)
    }

    pub(crate) fn get(&self, handle: Handle) -> Result<&T, Missing> {
        let index = self.index(handle)?;
        Ok(self.slots[index].entry.as_ref().map(|(_, value)| value).expect("index() saw it"))
    }

    pub(crate) fn get_mut(&mut self, handle: Handle) -> Result<&mut T, Missing> {
        let index = self.index(handle)?;
        Ok(self.slots[index].entry.as_mut().map(|(_, value)| value).expect("index() saw it"))
    }

    pub(crate) fn remove(&mut self, handle: Handle) -> Result<T, Missing> {
        let index = self.index(handle)?;
        self.slots[index].generation += 1;
        self.free.push(index);
        Ok(self.slots[index].entry.take().map(|(_, value)| value).expect("index() saw it"))
    }

    /// Handle, number of the call that made it, and object, of all there are.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Handle, u64, &T)> {
        self.slots
            .iter()
            .enumerate()
            .filter_map(|(index, slot)| slot.entry.as_ref().map(|(made, value)| (self.handle(index), *made, value)))
    }
}

impl From<Missing> for Code {
    fn from(_: Missing) -> Code {
        INVALID_HANDLE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_of_another_type_is_wrong_and_a_destroyed_one_is_stale() {
        let mut streams = Table::new(Kind::Stream);
        let mut events = Table::new(Kind::Event);
        let (stream, event) = (streams.insert(1, 'a'), events.insert(2, 'b'));
        assert_eq!(streams.get(stream), Ok(&'a'));
        assert_eq!(streams.get(event), Err(Missing::Wrong));
        assert_eq!(streams.get(0), Err(Missing::Wrong));
        assert_eq!(streams.remove(stream), Ok('a'));
        assert_eq!(streams.get(stream), Err(Missing::Stale));
        let next = streams.insert(3, 'c');
        assert_ne!(next, stream);
        assert_eq!(streams.get(stream), Err(Missing::Stale));
        assert_eq!(streams.iter().map(|(handle, made, _)| (handle, made)).collect::<Vec<_>>(), [(next, 3)]);
    }
}
