//! The data of a simulated Redis: texts, hashes and streams, with expiry.
//!
//! Every change records how to undo it, in steps of one command or script, so that a server can
//! come back without its last steps, as one does that lost the end of its append-only file.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    ops::RangeInclusive,
};

use bytes::Bytes;

/// The most steps that can be undone.
const STEPS_MAX: usize = 64;

/// The keys of one server.
#[derive(Clone, Default)]
pub struct Store {
    keys: HashMap<Bytes, Slot>,
    steps: VecDeque<Vec<Undo>>,
    step: Vec<Undo>,
    /// Entries added since this was last taken: key, number, last field.
    pub added: Vec<(Bytes, u64, Bytes)>,
}

#[derive(Clone)]
struct Slot {
    value: Value,
    expires: Option<u64>,
}

#[derive(Clone)]
enum Value {
    Text(Bytes),
    Hash(Hash),
    Stream(StoredStream),
}

/// A hash that keeps its fields in insertion order, as Redis does with small ones: field names are
/// random, so that an order by name would differ between runs of one seed.
#[derive(Clone, Default)]
pub struct Hash {
    rows: Vec<(Bytes, Bytes)>,
    positions: HashMap<Bytes, usize>,
}

/// A stream whose entries have ids `<number>-0`.
#[derive(Clone, Default)]
pub struct StoredStream {
    pub entries: BTreeMap<u64, Vec<Bytes>>,
    pub last: u64,
}

/// The undo of to undo a change.
#[derive(Clone)]
enum Undo {
    Slot(Bytes, Option<Slot>),
    Field(Bytes, Bytes, Option<Bytes>),
    Added(Bytes, u64, u64),
    Trimmed(Bytes, BTreeMap<u64, Vec<Bytes>>),
    Expiry(Bytes, Option<u64>),
}

/// The key has another type.
pub struct WrongType;

impl Hash {
    pub fn get(&self, field: &[u8]) -> Option<&Bytes> {
        self.positions.get(field).map(|place| &self.rows[*place].1)
    }

    pub fn rows(&self) -> &[(Bytes, Bytes)] {
        &self.rows
    }

    fn set(&mut self, field: Bytes, value: Bytes) -> Option<Bytes> {
        if let Some(place) = self.positions.get(&field) {
            return Some(std::mem::replace(&mut self.rows[*place].1, value));
        }
        self.positions.insert(field.clone(), self.rows.len());
        self.rows.push((field, value));
        None
    }

    fn remove(&mut self, field: &[u8]) -> Option<Bytes> {
        let place = self.positions.remove(field)?;
        let (_, value) = self.rows.remove(place);
        self.positions.values_mut().filter(|other| **other > place).for_each(|other| *other -= 1);
        Some(value)
    }
}

impl Store {
    /// Ends a step: later changes are undone separately.
    pub fn end_step(&mut self) {
        if !self.step.is_empty() {
            self.steps.push_back(std::mem::take(&mut self.step));
            if self.steps.len() > STEPS_MAX {
                self.steps.pop_front();
            }
        }
    }

    /// The type of a key, as `TYPE` names it; a sorted set is a hash here.
    pub fn type_of(&self, key: &[u8]) -> &'static str {
        match self.keys.get(key).map(|slot| &slot.value) {
            None => "none",
            Some(Value::Text(_)) => "string",
            Some(Value::Hash(_)) => "hash",
            Some(Value::Stream(_)) => "stream",
        }
    }

    /// Undoes the last `count` steps, or all that are recorded.
    pub fn undo(&mut self, count: usize) {
        self.end_step();
        for _ in 0..count {
            let Some(step) = self.steps.pop_back() else { return };
            step.into_iter().rev().for_each(|undo| self.undo_one(undo));
        }
    }

    fn undo_one(&mut self, undo: Undo) {
        match undo {
            Undo::Slot(key, Some(slot)) => {
                self.keys.insert(key, slot);
            }
            Undo::Slot(key, None) => {
                self.keys.remove(&key);
            }
            Undo::Field(key, field, before) => {
                let Some(Value::Hash(hash)) = self.value_mut(&key) else { return };
                match before {
                    Some(value) => hash.set(field, value),
                    None => hash.remove(&field),
                };
            }
            Undo::Added(key, number, last) => {
                let Some(Value::Stream(stream)) = self.value_mut(&key) else { return };
                stream.entries.remove(&number);
                stream.last = last;
            }
            Undo::Trimmed(key, mut entries) => {
                let Some(Value::Stream(stream)) = self.value_mut(&key) else { return };
                stream.entries.append(&mut entries);
            }
            Undo::Expiry(key, ends) => {
                if let Some(slot) = self.keys.get_mut(&key) {
                    slot.expires = ends;
                }
            }
        }
    }

    fn value_mut(&mut self, key: &[u8]) -> Option<&mut Value> {
        self.keys.get_mut(key).map(|slot| &mut slot.value)
    }

    /// Removes a key that has expired.
    pub fn expire(&mut self, key: &Bytes, now: u64) {
        if self.keys.get(key).is_some_and(|slot| slot.expires.is_some_and(|ends| ends <= now)) {
            self.delete(key);
        }
    }

    pub fn delete(&mut self, key: &Bytes) -> bool {
        let before = self.keys.remove(key);
        let was = before.is_some();
        if was {
            self.step.push(Undo::Slot(key.clone(), before));
        }
        was
    }

    pub fn exists(&self, key: &[u8]) -> bool {
        self.keys.contains_key(key)
    }

    pub fn set_expiry(&mut self, key: &Bytes, ends: u64) -> bool {
        let Some(slot) = self.keys.get_mut(key) else { return false };
        self.step.push(Undo::Expiry(key.clone(), slot.expires.replace(ends)));
        true
    }

    /// When a key expires, if it does.
    pub fn expiry(&self, key: &Bytes) -> Option<u64> {
        self.keys.get(key)?.expires
    }

    pub fn persist(&mut self, key: &Bytes) -> bool {
        let Some(slot) = self.keys.get_mut(key).filter(|slot| slot.expires.is_some()) else {
            return false;
        };
        self.step.push(Undo::Expiry(key.clone(), slot.expires.take()));
        true
    }

    pub fn text(&self, key: &[u8]) -> Result<Option<&Bytes>, WrongType> {
        match self.keys.get(key).map(|slot| &slot.value) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(_) => Err(WrongType),
        }
    }

    pub fn set_text(&mut self, key: &Bytes, text: Bytes) {
        let slot = Slot { value: Value::Text(text), expires: None };
        let before = self.keys.insert(key.clone(), slot);
        self.step.push(Undo::Slot(key.clone(), before));
    }

    pub fn hash(&self, key: &[u8]) -> Result<Option<&Hash>, WrongType> {
        match self.keys.get(key).map(|slot| &slot.value) {
            None => Ok(None),
            Some(Value::Hash(hash)) => Ok(Some(hash)),
            Some(_) => Err(WrongType),
        }
    }

    /// Sets a field. Returns whether it is new.
    pub fn set_field(
        &mut self,
        key: &Bytes,
        field: Bytes,
        value: Bytes,
    ) -> Result<bool, WrongType> {
        self.make(key, Value::Hash(Hash::default()));
        let Some(Value::Hash(hash)) = self.value_mut(key) else { return Err(WrongType) };
        let before = hash.set(field.clone(), value);
        let is_new = before.is_none();
        self.step.push(Undo::Field(key.clone(), field, before));
        Ok(is_new)
    }

    pub fn remove_field(&mut self, key: &Bytes, field: &Bytes) -> Result<bool, WrongType> {
        let hash = match self.value_mut(key) {
            None => return Ok(false),
            Some(Value::Hash(hash)) => hash,
            Some(_) => return Err(WrongType),
        };
        let Some(before) = hash.remove(field) else { return Ok(false) };
        let is_empty = hash.rows.is_empty();
        self.step.push(Undo::Field(key.clone(), field.clone(), Some(before)));
        if is_empty {
            self.delete(key);
        }
        Ok(true)
    }

    pub fn stream(&self, key: &[u8]) -> Result<Option<&StoredStream>, WrongType> {
        match self.keys.get(key).map(|slot| &slot.value) {
            None => Ok(None),
            Some(Value::Stream(stream)) => Ok(Some(stream)),
            Some(_) => Err(WrongType),
        }
    }

    /// Adds an entry, whose number the caller has checked.
    pub fn add(&mut self, key: &Bytes, number: u64, fields: Vec<Bytes>) -> Result<(), WrongType> {
        self.make(key, Value::Stream(StoredStream::default()));
        let Some(Value::Stream(stream)) = self.value_mut(key) else { return Err(WrongType) };
        let last = std::mem::replace(&mut stream.last, number);
        let payload = fields.last().cloned().unwrap_or_default();
        stream.entries.insert(number, fields);
        self.step.push(Undo::Added(key.clone(), number, last));
        self.added.push((key.clone(), number, payload));
        Ok(())
    }

    /// Removes the entries below `first`. Returns their number.
    pub fn trim(&mut self, key: &Bytes, first: u64) -> usize {
        let Some(Value::Stream(stream)) = self.value_mut(key) else { return 0 };
        let kept = stream.entries.split_off(&first);
        let trimmed = std::mem::replace(&mut stream.entries, kept);
        let count = trimmed.len();
        if count > 0 {
            self.step.push(Undo::Trimmed(key.clone(), trimmed));
        }
        count
    }

    fn make(&mut self, key: &Bytes, value: Value) {
        if !self.keys.contains_key(key) {
            self.keys.insert(key.clone(), Slot { value, expires: None });
            self.step.push(Undo::Slot(key.clone(), None));
        }
    }

    /// The stream whose key ends with `ending`, for checks.
    pub fn stream_ending(&self, ending: &str) -> Option<&StoredStream> {
        let key = self.keys.keys().find(|key| key.ends_with(ending.as_bytes()))?;
        self.stream(key).ok().flatten()
    }
}

impl StoredStream {
    /// The entries of a range of numbers.
    pub fn range(
        &self,
        range: RangeInclusive<u64>,
    ) -> impl DoubleEndedIterator<Item = (&u64, &Vec<Bytes>)> {
        // A map has no empty ranges.
        let none = range.is_empty();
        let whole = if none { 0..=0 } else { range };
        self.entries.range(whole).filter(move |_| !none)
    }
}
