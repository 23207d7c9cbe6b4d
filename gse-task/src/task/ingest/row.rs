//! A row as it is kept, whatever the agent has sent.

use gse_proto::session as s;
use gse_proto::state::StoredRow;

/// Longest text of a row.
const MAX_MESSAGE: usize = 4096;
/// Characters of a tag.
const MAX_TAG: usize = 256;

/// A row as it is kept. Whatever an agent sends, what callers see keeps to the contract: a running row is 115 with status 0 or 1, a
/// terminal one never is, only success has exit code 0, and terminal rows have times.
pub(super) fn stored_row(row: s::Row, now_ms: u64) -> StoredRow {
    use gse_proto::codes::Inner;
    let mut kept = StoredRow {
        status: row.status.clamp(0, 6),
        error_code: row.error_code,
        error_msg: cut(row.error_msg, MAX_MESSAGE),
        exit_code: row.exit_code,
        start_ms: row.start_ms,
        end_ms: row.end_ms,
        tag: row.tag.chars().take(MAX_TAG).collect(),
        output_len: row.output_len,
    };
    if kept.status <= s::RowStatus::Running as i32 {
        kept.error_code = Inner::Running.code();
        kept.exit_code = 0;
        kept.end_ms = 0;
        return kept;
    }
    if kept.error_code == Inner::Running.code() {
        kept.error_code = Inner::Unknown.code();
    }
    let succeeded = s::RowStatus::Succeeded as i32;
    if kept.status == succeeded && (kept.error_code != 0 || kept.exit_code != 0) {
        kept.status = s::RowStatus::Failed as i32;
    }
    if kept.status != succeeded && kept.exit_code == 0 {
        kept.exit_code = 1;
    }
    if kept.end_ms == 0 {
        kept.end_ms = now_ms;
    }
    if kept.start_ms == 0 || kept.start_ms > kept.end_ms {
        kept.start_ms = kept.end_ms;
    }
    kept
}

fn cut(mut text: String, most: usize) -> String {
    text.truncate(text.floor_char_boundary(most));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        // contract: v2-http-task#9, v2-http-task#12-15
        #[test]
        fn whatever_an_agent_sends_the_kept_row_is_one_of_the_contract(
            status in -2i32..10, error_code in prop_oneof![Just(0), Just(115), Just(126), Just(117), any::<i32>()],
            exit_code in prop_oneof![Just(0), Just(1), any::<i32>()], start_ms in 0u64..5, end_ms in 0u64..5,
        ) {
            let row = s::Row { status, error_code, exit_code, start_ms, end_ms, ..Default::default() };
            let kept = stored_row(row, 99);
            prop_assert!((0..=6).contains(&kept.status));
            prop_assert!(!(kept.error_code == 0 && kept.status == 0));
            prop_assert_eq!(kept.error_code == 115, kept.status < 2);
            prop_assert_eq!(kept.exit_code == 0, kept.status <= 2);
            if kept.status == 2 {
                prop_assert_eq!(kept.error_code, 0);
            }
            if kept.status >= 2 {
                prop_assert!(kept.start_ms > 0 && kept.end_ms >= kept.start_ms);
            }
        }
    }

    #[test]
    fn exit_codes_pass_through() {
        // contract: v2-http-task#15
        let row = s::Row {
            status: 5,
            exit_code: 42,
            start_ms: 1,
            end_ms: 2,
            ..Default::default()
        };
        let kept = stored_row(row, 99);
        assert_eq!((kept.error_code, kept.status, kept.exit_code), (0, 5, 42));
    }
}
