use super::*;

#[test]
fn placeholder_is_replaced() {
    let plan = Plan::new(PlanConfig::default(), 1, 1, &Bitmap::new(1), false, 1);
    assert_eq!(plan.missing(), 1);
}
