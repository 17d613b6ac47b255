package cluster

import (
	"slices"
	"strings"
)

// NextJobKey gives the first key after k, by namespace and ID, that a job, or
// anything that is left of a purged one, has; false when there is none. With it the
// state is walked job by job, on as many snapshots as one likes.
func (s *Snapshot) NextJobKey(k JobKey) (next JobKey, found bool) {
	after := k.Namespace + sep + k.ID
	best := ""
	take := func(key string, ok bool) {
		if ok && (!found || key < best) {
			best, found = key, true
		}
	}
	take(s.txn.rows[tableByName[TableJobs].number].ids.next(after))
	if key, ok := s.txn.rows[tableByName[TableJobVersions].number].ids.next(after + sep + "\xff"); ok { // beyond all numbers
		take(key[:strings.LastIndex(key, sep)], true)
	}
	for _, table := range []string{TableEvals, TableAllocs, TableDeployments} {
		q := newQuery(table, "job", nil)
		take(s.txn.rows[q.table.number].by[q.by].next(after))
	}
	next.Namespace, next.ID, _ = strings.Cut(best, sep)
	return next, found
}

// NodesVersion stands for the records of all nodes: equal values, of whatever
// snapshots, mean equal records.
func (s *Snapshot) NodesVersion() any { return s.txn.rows[tableByName[TableNodes].number] }

// AllocsVersion stands in the same way for the records of all allocations.
func (s *Snapshot) AllocsVersion() any { return s.txn.rows[tableByName[TableAllocs].number] }

// HoldingVersions calls fn for each node on which something holds resources, by ID,
// with what stands for that: equal versions, of whatever snapshots, mean the same
// allocations with the same resources.
func (s *Snapshot) HoldingVersions(fn func(nodeID string, version any)) {
	q := newQuery(TableAllocs, "holds", nil)
	s.txn.rows[q.table.number].by[q.by].ascend("", func(nodeID string, x *set) bool {
		fn(nodeID, x)
		return true
	})
}

// next gives the smallest key that is greater than key.
func (t *tree[V]) next(key string) (string, bool) {
	if t.root == nil {
		return "", false
	}
	return t.root.next(key)
}

func (n *node[V]) next(key string) (string, bool) {
	if n.kids == nil {
		i, found := slices.BinarySearch(n.keys, key)
		if found {
			i++
		}
		if i == len(n.keys) {
			return "", false
		}
		return n.keys[i], true
	}
	for i := n.below(key); i < len(n.kids); i++ { // the second time at the latest
		if k, ok := n.kids[i].next(key); ok {
			return k, true
		}
	}
	return "", false
}
