//! Bencoding (BEP 3): a decoder that checks a whole input in one pass and then only points into it, and an encoder.
//!
//! The decoder allocates nothing, so what it takes is bounded by the input, however hostile that is. It is strict about integers and
//! lengths (no leading zeros, no `-0`), and follows libtorrent in taking dictionaries whose keys are not sorted or come twice; the
//! first counts. What the values mean is left to those who ask for them.

/// How many lists and dictionaries may lie within each other.
pub const MAX_DEPTH: usize = 32;

/// Where and why an input is not bencoding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("byte {at}: {kind}")]
pub struct Error {
    /// Offset in the input.
    pub at: usize,
    /// What is wrong there.
    pub kind: ErrorKind,
}

/// What can be wrong with an input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ErrorKind {
    /// The input ends within a value.
    #[error("the input ends within a value")]
    Ended,
    /// No value begins like this.
    #[error("expected a value")]
    NotAValue,
    /// A dictionary's key is not a string.
    #[error("expected a string as key")]
    KeyNotAString,
    /// A dictionary ends after a key.
    #[error("a key without a value")]
    KeyWithoutValue,
    /// A number that is empty, has leading zeros, or something else than digits.
    #[error("a number that is not canonical")]
    BadNumber,
    /// A number that does not fit into 64 bits.
    #[error("a number beyond 64 bits")]
    NumberTooLarge,
    /// Lists and dictionaries within each other beyond [`MAX_DEPTH`].
    #[error("more than {MAX_DEPTH} lists and dictionaries within each other")]
    TooDeep,
    /// Something follows the value.
    #[error("something follows the value")]
    Trailing,
}

/// A decoded value; strings, lists and dictionaries point into the input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value<'a> {
    /// A number.
    Int(i64),
    /// A string; bytes, in fact.
    Bytes(&'a [u8]),
    /// A list.
    List(List<'a>),
    /// A dictionary.
    Dict(Dict<'a>),
}

impl<'a> Value<'a> {
    /// The number, if it is one.
    #[must_use]
    pub fn int(self) -> Option<i64> {
        match self {
            Value::Int(value) => Some(value),
            _ => None,
        }
    }

    /// The string, if it is one.
    #[must_use]
    pub fn bytes(self) -> Option<&'a [u8]> {
        match self {
            Value::Bytes(value) => Some(value),
            _ => None,
        }
    }

    /// The list, if it is one.
    #[must_use]
    pub fn list(self) -> Option<List<'a>> {
        match self {
            Value::List(value) => Some(value),
            _ => None,
        }
    }

    /// The dictionary, if it is one.
    #[must_use]
    pub fn dict(self) -> Option<Dict<'a>> {
        match self {
            Value::Dict(value) => Some(value),
            _ => None,
        }
    }
}

/// A list that was checked and is taken apart when it is walked through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct List<'a> {
    raw: &'a [u8],
}

impl<'a> List<'a> {
    /// Its encoded form.
    #[must_use]
    pub fn raw(&self) -> &'a [u8] {
        self.raw
    }

    /// Its values.
    pub fn iter(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        Values { rest: inner(self.raw) }
    }
}

/// A dictionary that was checked and is taken apart when it is walked through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dict<'a> {
    raw: &'a [u8],
}

impl<'a> Dict<'a> {
    /// Its encoded form; an info-hash is a hash of this.
    #[must_use]
    pub fn raw(&self) -> &'a [u8] {
        self.raw
    }

    /// Its keys and values, as they come.
    pub fn iter(&self) -> impl Iterator<Item = (&'a [u8], Value<'a>)> + use<'a> {
        let mut values = Values { rest: inner(self.raw) };
        std::iter::from_fn(move || {
            let key = values.next()?.bytes()?;
            Some((key, values.next()?))
        })
    }

    /// The first value under `key`. Takes a walk through the dictionary.
    #[must_use]
    pub fn get(&self, key: &[u8]) -> Option<Value<'a>> {
        self.iter().find(|(name, _)| *name == key).map(|(_, value)| value)
    }
}

/// Checks `input`, which must be one value and nothing more.
pub fn decode(input: &[u8]) -> Result<Value<'_>, Error> {
    let (value, used) = decode_prefix(input)?;
    if used != input.len() {
        return Err(Error {
            at: used,
            kind: ErrorKind::Trailing,
        });
    }
    Ok(value)
}

/// Checks the value that `input` begins with; also says how long it is.
pub fn decode_prefix(input: &[u8]) -> Result<(Value<'_>, usize), Error> {
    let end = check(input)?;
    let whole = &input[..end];
    let value = match whole.first() {
        Some(b'l') => Value::List(List { raw: whole }),
        Some(b'd') => Value::Dict(Dict { raw: whole }),
        Some(b'i') => Value::Int(number(whole, 1, b'e')?.0),
        _ => {
            let (_, start) = number(whole, 0, b':')?;
            Value::Bytes(&whole[start..])
        }
    };
    Ok((value, end))
}

/// What an open list or dictionary expects next.
#[derive(Clone, Copy)]
enum Open {
    List,
    Key,
    ValueOfKey,
}

/// Checks the value at the beginning and returns where it ends.
fn check(input: &[u8]) -> Result<usize, Error> {
    let mut open = [Open::List; MAX_DEPTH];
    let mut depth = 0_usize;
    let mut at = 0;
    loop {
        let fail = |kind| Err(Error { at, kind });
        let Some(&first) = input.get(at) else {
            return fail(ErrorKind::Ended);
        };
        let inside = depth.checked_sub(1).map(|top| open[top]);
        match (inside, first) {
            (Some(Open::List | Open::Key), b'e') => {
                depth -= 1;
                at += 1;
            }
            (Some(Open::ValueOfKey), b'e') => return fail(ErrorKind::KeyWithoutValue),
            (Some(Open::Key), b'0'..=b'9') => {
                at = string(input, at)?;
                open[depth - 1] = Open::ValueOfKey;
                continue;
            }
            (Some(Open::Key), _) => return fail(ErrorKind::KeyNotAString),
            (_, b'l' | b'd') => {
                if depth == MAX_DEPTH {
                    return fail(ErrorKind::TooDeep);
                }
                open[depth] = if first == b'l' { Open::List } else { Open::Key };
                depth += 1;
                at += 1;
                continue;
            }
            (_, b'i') => at = number(input, at + 1, b'e')?.1,
            (_, b'0'..=b'9') => at = string(input, at)?,
            _ => return fail(ErrorKind::NotAValue),
        }
        // A value has ended here; it may have been that of a key, or all there is.
        let Some(top) = depth.checked_sub(1) else {
            return Ok(at);
        };
        if let Open::ValueOfKey = open[top] {
            open[top] = Open::Key;
        }
    }
}

/// The end of the string at `at`.
fn string(input: &[u8], at: usize) -> Result<usize, Error> {
    let (len, start) = number(input, at, b':')?;
    usize::try_from(len)
        .ok()
        .and_then(|len| start.checked_add(len))
        .filter(|end| *end <= input.len())
        .ok_or(Error {
            at,
            kind: ErrorKind::Ended,
        })
}

/// The number that begins at `at`, and what follows the `end` after it.
fn number(input: &[u8], at: usize, end: u8) -> Result<(i64, usize), Error> {
    let fail = |kind| Err(Error { at, kind });
    let negative = input.get(at) == Some(&b'-');
    let digits = at + usize::from(negative);
    let mut value: i64 = 0;
    let mut here = digits;
    loop {
        match input.get(here) {
            None => return fail(ErrorKind::Ended),
            Some(digit @ b'0'..=b'9') => {
                let digit = i64::from(digit - b'0');
                let next = value.checked_mul(10).and_then(|ten| {
                    if negative {
                        ten.checked_sub(digit)
                    } else {
                        ten.checked_add(digit)
                    }
                });
                match next {
                    Some(next) => value = next,
                    None => return fail(ErrorKind::NumberTooLarge),
                }
                here += 1;
            }
            Some(other) if *other == end => break,
            Some(_) => return fail(ErrorKind::BadNumber),
        }
    }
    let canonical = match here - digits {
        0 => false,
        1 => input[digits] != b'0' || !negative,
        _ => input[digits] != b'0',
    };
    if !canonical || (negative && end == b':') {
        return fail(ErrorKind::BadNumber);
    }
    Ok((value, here + 1))
}

/// What is between the first and the last byte of a list or dictionary.
fn inner(raw: &[u8]) -> &[u8] {
    raw.get(1..raw.len().saturating_sub(1)).unwrap_or_default()
}

/// Takes values off the front of checked input.
struct Values<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Values<'a> {
    type Item = Value<'a>;

    fn next(&mut self) -> Option<Value<'a>> {
        if self.rest.is_empty() {
            return None;
        }
        // It was checked as a part of the whole, so this fails for no input.
        let (value, used) = decode_prefix(self.rest).ok()?;
        self.rest = &self.rest[used..];
        Some(value)
    }
}

/// Writes bencoding. Keys of a dictionary have to be given in their order, which is that of their bytes.
#[derive(Debug, Default)]
pub struct Encoder {
    out: Vec<u8>,
}

impl Encoder {
    /// Nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// What was written.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        self.out
    }

    /// A number.
    pub fn int(&mut self, value: i64) {
        self.out.extend_from_slice(format!("i{value}e").as_bytes());
    }

    /// A string.
    pub fn bytes(&mut self, value: &[u8]) {
        self.out.extend_from_slice(format!("{}:", value.len()).as_bytes());
        self.out.extend_from_slice(value);
    }

    /// A value that is encoded already.
    pub fn raw(&mut self, encoded: &[u8]) {
        self.out.extend_from_slice(encoded);
    }

    /// A list of what `fill` writes.
    pub fn list(&mut self, fill: impl FnOnce(&mut Encoder)) {
        self.out.push(b'l');
        fill(self);
        self.out.push(b'e');
    }

    /// A dictionary of what `fill` writes.
    pub fn dict(&mut self, fill: impl FnOnce(&mut DictEncoder<'_>)) {
        self.out.push(b'd');
        fill(&mut DictEncoder {
            encoder: self,
            last: None,
        });
        self.out.push(b'e');
    }
}

/// Writes the entries of one dictionary.
#[derive(Debug)]
pub struct DictEncoder<'e> {
    encoder: &'e mut Encoder,
    /// Where the last key lies in what was written, to see that the next one comes after it.
    last: Option<(usize, usize)>,
}

impl DictEncoder<'_> {
    /// The encoder for the value of `key`, which must be written next, and only it.
    pub fn key(&mut self, key: &[u8]) -> &mut Encoder {
        debug_assert!(
            self.last.is_none_or(|(from, to)| &self.encoder.out[from..to] < key),
            "keys are written in their order"
        );
        self.encoder.bytes(key);
        let end = self.encoder.out.len();
        self.last = Some((end - key.len(), end));
        self.encoder
    }

    /// `key` with a number.
    pub fn int(&mut self, key: &[u8], value: i64) {
        self.key(key).int(value);
    }

    /// `key` with a string.
    pub fn bytes(&mut self, key: &[u8], value: &[u8]) {
        self.key(key).bytes(value);
    }
}

#[cfg(test)]
mod tests;
