//! Reading replies. Redis gives the same answer in several shapes, by protocol version and by command; these take all of them.

use bytes::Bytes;
use redis::Value;

use super::StoreError;

/// A text or number as bytes; none for nil.
///
/// # Errors
/// The reply is a list or the like.
pub fn as_bytes(value: Value) -> Result<Option<Bytes>, StoreError> {
    Ok(Some(match value {
        Value::Nil => return Ok(None),
        Value::BulkString(bytes) => Bytes::from(bytes),
        Value::SimpleString(text) | Value::VerbatimString { text, .. } => Bytes::from(text),
        Value::Okay => Bytes::from_static(b"OK"),
        Value::Int(number) => Bytes::from(number.to_string()),
        Value::Double(number) => Bytes::from(number.to_string()),
        Value::Boolean(flag) => Bytes::from_static(if flag { b"1" } else { b"0" }),
        Value::Attribute { data, .. } => return as_bytes(*data),
        other => return Err(unexpected("a text", &other)),
    }))
}

/// A text; none for nil. Bytes that are not UTF-8 are replaced.
///
/// # Errors
/// The reply is a list or the like.
pub fn as_string(value: Value) -> Result<Option<String>, StoreError> {
    Ok(as_bytes(value)?.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
}

/// A whole number, also when it came as text.
///
/// # Errors
/// The reply is nil or no whole number.
pub fn as_int(value: Value) -> Result<i64, StoreError> {
    let found = name_of(&value);
    match value {
        Value::Int(number) => Ok(number),
        other => parse(other, "a whole number", found),
    }
}

/// A number, also when it came as text.
///
/// # Errors
/// The reply is nil or no number.
pub fn as_float(value: Value) -> Result<f64, StoreError> {
    let found = name_of(&value);
    match value {
        Value::Double(number) => Ok(number),
        other => parse(other, "a number", found),
    }
}

fn parse<T: std::str::FromStr>(value: Value, wanted: &'static str, found: &'static str) -> Result<T, StoreError> {
    let text = as_string(value).map_err(|_| StoreError::Unexpected { wanted, found })?;
    text.and_then(|text| text.trim().parse().ok())
        .ok_or(StoreError::Unexpected { wanted, found })
}

/// The elements of a list or set; none for nil.
///
/// # Errors
/// The reply is a text, a number or a map.
pub fn as_array(value: Value) -> Result<Vec<Value>, StoreError> {
    match value {
        Value::Nil => Ok(Vec::new()),
        Value::Array(items) | Value::Set(items) => Ok(items),
        Value::Attribute { data, .. } => as_array(*data),
        other => Err(unexpected("a list", &other)),
    }
}

/// The pairs of a map (`HGETALL`), of a flat list (the same, in the old protocol) or of a list of pairs (`ZRANGE … WITHSCORES`).
/// A nil inside is empty.
///
/// # Errors
/// The reply is no such thing, or a list of odd length.
pub fn as_pairs(value: Value) -> Result<Vec<(Bytes, Bytes)>, StoreError> {
    let pair = |first: Value, second: Value| {
        Ok((
            as_bytes(first)?.unwrap_or_default(),
            as_bytes(second)?.unwrap_or_default(),
        ))
    };
    let is_pair = |item: &Value| matches!(item, Value::Array(inner) if inner.len() == 2);
    match value {
        Value::Nil => Ok(Vec::new()),
        Value::Map(pairs) => pairs.into_iter().map(|(first, second)| pair(first, second)).collect(),
        Value::Attribute { data, .. } => as_pairs(*data),
        Value::Array(items) if items.iter().all(is_pair) => items
            .into_iter()
            .map(|item| {
                let [first, second] = <[Value; 2]>::try_from(as_array(item)?).map_err(|_| StoreError::Unexpected {
                    wanted: "a pair",
                    found: "a list",
                })?;
                pair(first, second)
            })
            .collect(),
        Value::Array(items) => {
            if items.len() % 2 != 0 {
                return Err(StoreError::Unexpected {
                    wanted: "pairs",
                    found: "a list of odd length",
                });
            }
            let mut items = items.into_iter();
            let mut pairs = Vec::with_capacity(items.len() / 2);
            while let (Some(first), Some(second)) = (items.next(), items.next()) {
                pairs.push(pair(first, second)?);
            }
            Ok(pairs)
        }
        other => Err(unexpected("pairs", &other)),
    }
}

fn unexpected(wanted: &'static str, found: &Value) -> StoreError {
    StoreError::Unexpected {
        wanted,
        found: name_of(found),
    }
}

fn name_of(value: &Value) -> &'static str {
    match value {
        Value::Nil => "nil",
        Value::Int(_) => "a whole number",
        Value::Double(_) => "a number",
        Value::BulkString(_) | Value::SimpleString(_) | Value::Okay | Value::VerbatimString { .. } => "a text",
        Value::Boolean(_) => "true or false",
        Value::Array(_) | Value::Set(_) => "a list",
        Value::Map(_) => "a map",
        Value::ServerError(_) => "an error",
        _ => "something else",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bulk(text: &str) -> Value {
        Value::BulkString(text.into())
    }

    #[test]
    fn both_protocols_read_the_same() {
        let wanted = vec![
            (Bytes::from("a"), Bytes::from("1")),
            (Bytes::from("b"), Bytes::from("2.5")),
        ];
        let flat = Value::Array(vec![bulk("a"), bulk("1"), bulk("b"), bulk("2.5")]);
        let map = Value::Map(vec![(bulk("a"), Value::Int(1)), (bulk("b"), Value::Double(2.5))]);
        let nested = Value::Array(vec![
            Value::Array(vec![bulk("a"), Value::Int(1)]),
            Value::Array(vec![bulk("b"), Value::Double(2.5)]),
        ]);
        for shape in [flat, map, nested] {
            assert_eq!(as_pairs(shape).unwrap(), wanted);
        }
        assert!(as_pairs(Value::Nil).unwrap().is_empty());
        assert!(as_pairs(Value::Array(vec![])).unwrap().is_empty());
        assert!(as_pairs(Value::Array(vec![bulk("a")])).is_err());
        assert!(as_pairs(Value::Int(1)).is_err());
    }

    #[test]
    fn scalars_read_from_every_shape() {
        assert_eq!(as_bytes(Value::Nil).unwrap(), None);
        assert_eq!(as_bytes(bulk("x")).unwrap().unwrap(), "x");
        assert_eq!(as_bytes(Value::Okay).unwrap().unwrap(), "OK");
        assert!(as_bytes(Value::Array(vec![])).is_err());
        assert_eq!(as_int(Value::Int(-3)).unwrap(), -3);
        assert_eq!(as_int(bulk("42")).unwrap(), 42);
        assert!(as_int(bulk("forty")).is_err());
        assert!(as_int(Value::Nil).is_err());
        assert_eq!(as_float(bulk("1.5")).unwrap(), 1.5);
        assert_eq!(as_float(Value::Double(1.5)).unwrap(), 1.5);
        assert_eq!(as_float(Value::Int(2)).unwrap(), 2.0);
        assert_eq!(as_array(Value::Set(vec![bulk("x")])).unwrap(), [bulk("x")]);
        assert!(as_array(Value::Nil).unwrap().is_empty());
        assert!(as_array(bulk("x")).is_err());
    }
}
