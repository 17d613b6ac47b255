package cluster

import (
	"fmt"
	"slices"
	"strings"
)

// view is all tables at one moment. A committed one never changes.
type view struct {
	hub     *hub
	rows    []*rows      // by Table.number; empty for the index table and the results
	index   []IndexEntry // by table
	results results
}

// indexOf is the log index of an entry of the index table, 0 for none.
func (v *view) indexOf(table string) uint64 {
	if i, ok := v.findIndex(table); ok {
		return v.index[i].Index
	}
	return 0
}

func (v *view) findIndex(table string) (int, bool) {
	return slices.BinarySearchFunc(v.index, table, func(e IndexEntry, name string) int { return strings.Compare(e.Table, name) })
}

// setIndex is for a view that is being written; 0 removes the entry.
func (v *view) setIndex(table string, index uint64) {
	switch i, ok := v.findIndex(table); {
	case ok && index == 0:
		v.index = slices.Delete(v.index, i, i+1)
	case ok:
		v.index[i].Index = index
	case index != 0:
		v.index = slices.Insert(v.index, i, IndexEntry{Table: table, Index: index})
	}
}

// watchIndex watches one entry of the index table, or all.
func (v *view) watchIndex(ws WatchSet, table string, all bool) {
	v.hub.watch(ws, watchKey{TableIndex, "id"}, table, all, func(now *view) bool {
		if all {
			return slices.Equal(now.index, v.index)
		}
		return now.indexOf(table) == v.indexOf(table)
	})
}

// query is what a read asks for: the records of an index under one value, or under all values with a prefix.
type query struct {
	table  *Table
	by     int // the secondary index; -1: primary keys
	value  string
	prefix bool
}

// newQuery reads an index name, which may end with _prefix, and the parts of a value.
func newQuery(table, index string, args []string) query {
	q := query{table: tableByName[table], by: -1}
	index, q.prefix = strings.CutSuffix(index, "_prefix")
	if index != "id" {
		q.by = slices.IndexFunc(q.table.indexes, func(x secondary) bool { return x.name == index })
		if q.by < 0 {
			panic(fmt.Sprintf("table %s has no index %s", table, index)) // a bug
		}
	}
	if len(args) == 1 {
		q.value = args[0]
	} else {
		q.value = strings.Join(args, sep)
	}
	return q
}

// scan calls fn for the records in the order of the index until it returns false.
func (v *view) scan(q query, fn func(any) bool) {
	r := v.rows[q.table.number]
	r.find(q, func(s slot) bool { return fn(r.at(s)) })
}

// find calls fn for the slots that a query asks for, in the order of the index, until it returns false.
func (r *rows) find(q query, fn func(slot) bool) {
	switch {
	case q.by < 0 && q.prefix:
		r.ids.ascend(q.value, func(_ string, s slot) bool { return fn(s) })
	case q.by < 0:
		if s, ok := r.ids.get(q.value); ok {
			fn(s)
		}
	case q.prefix:
		r.by[q.by].ascend(q.value, func(_ string, x *set) bool { return x.each(fn) })
	default:
		if x, ok := r.by[q.by].get(q.value); ok {
			x.each(fn)
		}
	}
}

// ended gives those of a job's records in a table that are at rest.
func (v *view) ended(table string, k JobKey) (list []Ended) {
	q := newQuery(table, "job", []string{k.Namespace, k.ID})
	r := v.rows[q.table.number]
	r.find(q, func(s slot) bool {
		if rest, ok := r.records.get(s).(*atRest); ok {
			list = append(list, Ended{rest.key, rest.ended})
		}
		return true
	})
	return list
}

// watch adds to ws what tells of a change of the records that were read.
func (v *view) watch(ws WatchSet, q query) {
	k := watchKey{q.table.Name, "id"}
	if q.by >= 0 {
		k.by = q.table.indexes[q.by].name
	}
	v.hub.watch(ws, k, q.value, q.prefix, func(now *view) bool { return v.same(now, q) })
}

// same says whether a query gives the same records in another view.
func (v *view) same(now *view, q query) bool {
	before, after := v.rows[q.table.number], now.rows[q.table.number]
	if before == after {
		return true
	}
	var list []any
	before.find(q, func(s slot) bool { list = append(list, before.records.get(s)); return true })
	i, same := 0, true
	after.find(q, func(s slot) bool {
		same = i < len(list) && list[i] == after.records.get(s)
		i++
		return same
	})
	return same && i == len(list)
}

// first looks one record up; nil when there is none.
func first[T any](v *view, ws WatchSet, table, index string, args ...string) (found *T) {
	q := newQuery(table, index, args)
	v.scan(q, func(rec any) bool {
		found = rec.(*T)
		return false
	})
	if ws != nil {
		v.watch(ws, q)
	}
	return found
}

// list collects the records of an index, in its order.
func list[T any](v *view, ws WatchSet, table, index string, args ...string) (all []*T) {
	q := newQuery(table, index, args)
	v.scan(q, func(rec any) bool {
		all = append(all, rec.(*T))
		return true
	})
	if ws != nil {
		v.watch(ws, q)
	}
	return all
}

// each calls fn for the records of an index, in its order, until it returns false.
func each[T any](v *view, fn func(*T) bool, table, index string, args ...string) {
	v.scan(newQuery(table, index, args), func(rec any) bool { return fn(rec.(*T)) })
}

func reverse[T any](s []T) []T {
	slices.Reverse(s)
	return s
}

// Records calls fn for every record, table by table in the order of Tables and
// by key within a table: what a snapshot file holds. A record comes as it is kept,
// for AppendStored, Marshal or Restore.
func (s *Snapshot) Records(fn func(t *Table, key string, record any) error) (err error) {
	for _, t := range Tables {
		switch t.Name {
		case TableIndex:
			for i := range s.txn.index {
				if err := fn(t, s.txn.index[i].Table, &s.txn.index[i]); err != nil {
					return err
				}
			}
		case TableResults:
			for _, e := range s.txn.results.sorted() {
				if err := fn(t, e.RequestID, e); err != nil {
					return err
				}
			}
		default:
			r := s.txn.rows[t.number]
			r.ids.ascend("", func(key string, at slot) bool {
				err = fn(t, key, r.records.get(at))
				return err == nil
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}
