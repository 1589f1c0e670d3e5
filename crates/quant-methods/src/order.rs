//! Orders in which GPTQ rounds columns.

use crate::gptq::ColumnOrder;

/// The columns of an input in the order in which they are rounded; `None` is the stored order.
///
/// `activity`: the diagonal of the Hessian `[k]`; `len`: columns per group. Equal activities keep their order.
pub(crate) fn column_order(order: ColumnOrder, activity: &[f32], len: usize) -> Option<Vec<u32>> {
    let descending = |a: &u32, b: &u32| activity[*b as usize].total_cmp(&activity[*a as usize]);
    let mut perm: Vec<u32> = (0..activity.len() as u32).collect();
    match order {
        ColumnOrder::Natural => {}
        ColumnOrder::Activation => perm.sort_by(descending),
        // A single group of any length: nothing ties its columns to their places.
        ColumnOrder::GroupAware if len >= activity.len() => perm.sort_by(descending),
        ColumnOrder::GroupAware => {
            // A short last group stays last, so that all before it stay whole.
            let whole = perm.len() / len * len;
            let mut groups: Vec<&mut [u32]> = perm[..whole].chunks_mut(len).collect();
            groups.iter_mut().for_each(|group| group.sort_by(descending));
            groups.sort_by(|a, b| descending(&a[0], &b[0]));
            let ordered = groups.concat();
            perm[..whole].copy_from_slice(&ordered);
        }
    }
    (!perm.is_sorted()).then_some(perm)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_those_of_the_definition() {
        let activity = [1.0, 3.0, 2.0, 9.0, 0.0, 5.0, 7.0];
        let order = |order, len| column_order(order, &activity, len);
        assert_eq!(order(ColumnOrder::Natural, 2), None);
        assert_eq!(order(ColumnOrder::Activation, 2), Some(vec![3, 6, 5, 1, 2, 0, 4]));
        // Groups {1,0} {3,2} {5,4} by their largest, the seventh column left where it is.
        assert_eq!(order(ColumnOrder::GroupAware, 2), Some(vec![3, 2, 5, 4, 1, 0, 6]));
        assert_eq!(order(ColumnOrder::GroupAware, 7), order(ColumnOrder::Activation, 2));
        assert_eq!(column_order(ColumnOrder::Activation, &[2.0, 2.0, 1.0], 1), None);
        assert_eq!(column_order(ColumnOrder::GroupAware, &[], 4), None);
    }
}
