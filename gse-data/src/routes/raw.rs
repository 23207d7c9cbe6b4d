//! JSON objects kept as they were written: their keys in their order, their values letter for letter.
//!
//! Clients compare what they read back with what they wrote, so that nothing may be added, dropped or spelled anew (contract
//! data-plane, 3.5). What the values mean is [`super::spec`]'s.

use std::fmt;

use serde::de::{MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;

/// An object of any keys.
#[derive(Debug, Clone, Default)]
pub struct RawObject(Vec<(String, Box<RawValue>)>);

impl RawObject {
    /// The value of a key, unless it is missing or null.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&RawValue> {
        let (_, value) = self.0.iter().find(|(name, _)| name == key)?;
        (value.get() != "null").then_some(value.as_ref())
    }

    /// The value of a key read as a type; none if it is missing, null, or something else.
    #[must_use]
    pub fn read<T: for<'de> Deserialize<'de>>(&self, key: &str) -> Option<T> {
        serde_json::from_str(self.get(key)?.get()).ok()
    }

    /// Adds a key behind the others.
    ///
    /// # Errors
    /// The value cannot be written as JSON.
    pub fn with<T: Serialize + ?Sized>(mut self, key: &str, value: &T) -> serde_json::Result<Self> {
        self.0.push((key.to_owned(), serde_json::value::to_raw_value(value)?));
        Ok(self)
    }

    /// Removes a key whose value is null.
    pub fn drop_null(&mut self, key: &str) {
        self.0.retain(|(name, value)| name != key || value.get() != "null");
    }
}

impl<'de> Deserialize<'de> for RawObject {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawObject;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawObject, A::Error> {
                let mut entries: Vec<(String, Box<RawValue>)> = Vec::new();
                while let Some((key, value)) = map.next_entry::<String, Box<RawValue>>()? {
                    match entries.iter_mut().find(|(name, _)| *name == key) {
                        Some(entry) => entry.1 = value,
                        None => entries.push((key, value)),
                    }
                }
                Ok(RawObject(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

impl Serialize for RawObject {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (key, value) in &self.0 {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_comes_back_letter_for_letter() {
        // contract: data-plane#19
        let text = r#"{"z":1.0,"a":{"b": [1,  2],"a":"\u00e9"},"big":123456789012345678901234567890}"#;
        let object: RawObject = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&object).unwrap(), text);
        let mut object: RawObject = serde_json::from_str(r#"{"n":null,"a":2,"a":3}"#).unwrap();
        assert!(object.get("n").is_none() && object.read::<u32>("a") == Some(3));
        object.drop_null("n");
        assert_eq!(serde_json::to_string(&object).unwrap(), r#"{"a":3}"#);
        assert!(serde_json::from_str::<RawObject>("[]").is_err());
    }
}
