//! Both ends beside each other: which keys are not the same, and making them so.

use bytes::Bytes;

use super::engine::{Copier, Side};
use super::values::{self, cmd};
use super::{Progress, Trouble, Words};

impl Copier {
    /// Compares all keys of both ends; what differs is copied again. Gives how many differ that nobody had marked, after that was tried: none, unless something
    /// writes to an end that does not tell.
    pub(crate) async fn verify(&mut self) -> Result<u64, Trouble> {
        self.probe().await?;
        self.compare(true).await
    }

    pub(super) async fn compare(&mut self, count: bool) -> Result<u64, Trouble> {
        let mut wrong = 0;
        let mut cursor = Bytes::from_static(b"0");
        loop {
            let (next, keys) = self.page(Side::Source, &cursor).await?;
            for part in keys.chunks(self.job.settings.batch) {
                let differ = self.differing(part).await?;
                if !differ.is_empty() {
                    self.copy(&differ).await?;
                    let still = self.differing(&differ).await?;
                    wrong += still.len() as u64;
                    self.job.tracker.again(still.iter());
                }
                if count {
                    Progress::add(&self.job.progress.compared, part.len() as u64);
                }
                self.pause(0, part.len() as u64).await?;
            }
            cursor = next;
            if cursor == "0" {
                break;
            }
        }
        // What the source does not have any more.
        loop {
            let (next, keys) = self.page(Side::Target, &cursor).await?;
            let asked: Vec<Words> = keys.iter().map(|k| cmd(&[b"EXISTS", k])).collect();
            let got = self.ask(Side::Source, &asked).await?;
            let extra: Vec<Bytes> = keys
                .into_iter()
                .zip(got)
                .filter(|(k, r)| r.int() == Some(0) && !self.job.tracker.is_marked(k))
                .map(|(k, _)| k)
                .collect();
            self.copy(&extra).await?;
            cursor = next;
            if cursor == "0" {
                break;
            }
        }
        if count {
            Progress::add(&self.job.progress.mismatched, wrong);
        }
        Ok(wrong)
    }

    /// Which of these keys are not the same on both ends, and not marked.
    async fn differing(&mut self, keys: &[Bytes]) -> Result<Vec<Bytes>, Trouble> {
        let [a, b] = [
            self.digests(Side::Source, keys).await?,
            self.digests(Side::Target, keys).await?,
        ];
        let exact = self.exact == [true; 2];
        Ok(keys
            .iter()
            .zip(a.into_iter().zip(b))
            .filter(|(k, (a, b))| {
                let same = match (a, b) {
                    (None, None) => true,
                    (Some(a), Some(b)) => a.1 == b.1 && same_expiry(a.0, b.0, exact),
                    // One that is about to expire goes on one end before the other.
                    (Some(a), None) | (None, Some(a)) => a.0 >= 0 && a.0 <= values::now_ms() + 1000,
                };
                !same && !self.job.tracker.is_marked(k)
            })
            .map(|(k, _)| k.clone())
            .collect())
    }
}

fn same_expiry(a: i64, b: i64, exact: bool) -> bool {
    a == b || (!exact && a >= 0 && b >= 0 && (a - b).abs() < 2000)
}
