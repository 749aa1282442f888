//! What a newcomer meets: how large the program is, and how long it takes from nothing to an answer.

use std::time::Instant;

use crate::Table;
use crate::harness::cluster::TestDb;
use crate::harness::node::Node;
use crate::harness::node::PROGRAM;
use crate::load::report::Figures;

const STARTS: usize = 5;

pub async fn measure() {
    let bytes = std::fs::metadata(PROGRAM).expect("the program").len();
    let mut table = Table::new("first", &["what", "median", "lowest", "highest"]);
    let mut first = Vec::new();
    let mut again = Vec::new();
    for _ in 0..STARTS {
        let db = TestDb::sqlite();
        first.push(start_to_answer(&db).await);
        again.push(start_to_answer(&db).await);
    }
    for (what, figures) in [("from start to first answer, SQLite, no database yet", first), ("the same, started again", again)] {
        let Figures { median, lowest, highest } = Figures::of(figures);
        table.line(vec![what.to_owned(), format!("{median:.0} ms"), format!("{lowest:.0} ms"), format!("{highest:.0} ms")]);
    }
    table.line(vec!["the program".to_owned(), format!("{:.1} MB", bytes as f64 / 1e6), String::new(), String::new()]);
    table.end();
}

async fn start_to_answer(db: &TestDb) -> f64 {
    let began = Instant::now();
    let node = Node::start(db.settings(&[])).await;
    node.query(1).await;
    began.elapsed().as_secs_f64() * 1e3
}
