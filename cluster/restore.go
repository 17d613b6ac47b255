package cluster

import (
	"bytes"
	"fmt"
	"slices"
)

// Reader decodes the records of a snapshot for a Restore. It is for one goroutine; several may work for one Restore.
type Reader struct{ shared *interner }

// NewReader makes a Reader.
func NewReader() *Reader { return &Reader{newInterner(restoreBits)} }

// Row is a decoded record.
type Row struct {
	Key    string
	table  *Table
	record any
	stored []byte
}

// Read decodes one record, as AppendStored or Marshal wrote it. The row needs its bytes until it was put.
func (x *Reader) Read(t *Table, stored []byte) (Row, error) {
	r := Row{table: t, record: t.New(), stored: stored}
	d := decoder{left: stored, shared: x.shared, short: true}
	if err := d.record(r.record); err != nil {
		return Row{}, fmt.Errorf("table %s: %w", t.Name, err)
	}
	if r.Key = t.key(r.record); r.Key == "" {
		return Row{}, fmt.Errorf("table %s: a record has no key", t.Name)
	}
	if t.pack != nil {
		t.pack(x.shared, r.record)
	}
	return r, nil
}

// Restore builds a State from the records of a snapshot. Those of a table that come together and in the order of their
// keys, as Records gives them, take far less time than others.
type Restore struct {
	state   *State
	batch   *batch
	reader  *Reader // of Add
	filling *filling
	results []resultEntry
	scratch []byte
}

// NewRestore begins a restore.
func NewRestore() *Restore {
	s := NewState()
	return &Restore{state: s, batch: s.begin()}
}

// Add takes one record as AppendStored or Marshal wrote it, and keeps nothing of its bytes.
func (r *Restore) Add(t *Table, stored []byte) error {
	if r.reader == nil {
		r.reader = NewReader()
	}
	row, err := r.reader.Read(t, stored)
	if err == nil {
		r.Put(row)
	}
	return err
}

// Put takes one row.
func (r *Restore) Put(row Row) {
	t := row.table
	if r.filling != nil && (r.filling.table != t || row.Key <= r.filling.last) {
		r.filling.finish()
		r.filling = nil
	}
	switch v := row.record.(type) {
	case *IndexEntry:
		r.batch.view.setIndex(v.Table, v.Index)
	case *resultEntry:
		r.results = append(r.results, *v)
	default:
		if j, ok := v.(*Job); ok && t.Name == TableJobVersions {
			v = r.sameJob(j, row.stored)
		}
		rows := r.batch.rows(t)
		if r.filling == nil && rows.records.n == 0 {
			r.filling = newFilling(r.batch.edit, t, rows)
		}
		if r.filling != nil {
			r.filling.add(row.Key, v)
		} else {
			rows.put(r.batch.edit, t, row.Key, v)
		}
	}
}

// sameJob gives the job itself in place of its current version, which is the same record.
func (r *Restore) sameJob(version *Job, stored []byte) *Job {
	j := first[Job](r.batch.view, nil, TableJobs, "id", version.Namespace, version.ID)
	if j == nil || j.Version != version.Version {
		return version
	}
	if r.scratch = AppendStored(r.scratch[:0], j); !bytes.Equal(r.scratch, stored) {
		return version
	}
	return j
}

// Done ends the restore; the state is given only when Check finds it whole.
func (r *Restore) Done() (*State, error) {
	if r.filling != nil {
		r.filling.finish()
	}
	slices.SortFunc(r.results, func(a, b resultEntry) int { return int(a.Seq) - int(b.Seq) })
	for _, e := range r.results {
		r.batch.keep(e)
	}
	now := &Snapshot{txn: r.batch.view}
	usage := now.addUpUsage()
	rows := r.batch.rows(usageTable)
	for _, name := range sortedKeys(usage) {
		rows.put(r.batch.edit, usageTable, name, usage[name])
	}
	r.batch.commit()
	if err := r.state.Snapshot().Check(); err != nil {
		return nil, fmt.Errorf("restored state is damaged: %w", err)
	}
	return r.state, nil
}

// filling fills an empty table with records that come in the order of their keys. Its trees are built when all are
// there, from the leaves up.
type filling struct {
	edit   edit
	table  *Table
	rows   *rows
	last   string // key
	leaves []*node[slot]
	by     []groups
}

// groups are the slots under each value of an index.
type groups struct {
	at    map[string]int // value → place in slots
	slots [][]slot
}

func newFilling(e edit, t *Table, r *rows) *filling {
	f := &filling{edit: e, table: t, rows: r, by: make([]groups, len(t.indexes))}
	for i := range f.by {
		f.by[i].at = map[string]int{}
	}
	return f
}

// add takes a record whose key is greater than all before.
func (f *filling) add(key string, record any) {
	s := f.rows.records.n
	f.rows.records.set(f.edit, s, f.table.settle(key, record))
	n := len(f.leaves)
	if n == 0 || len(f.leaves[n-1].keys) == maxKeys {
		f.leaves = append(f.leaves, &node[slot]{edit: f.edit, keys: make([]string, 0, maxKeys), vals: make([]slot, 0, maxKeys)})
		n++
	}
	leaf := f.leaves[n-1]
	leaf.keys, leaf.vals = append(leaf.keys, key), append(leaf.vals, s)
	f.last = key
	for i, x := range f.table.indexes {
		value := x.of(record)
		if value == "" {
			continue
		}
		g := &f.by[i]
		at, ok := g.at[value]
		if !ok {
			at = len(g.slots)
			g.at[value] = at
			g.slots = append(g.slots, nil)
		}
		g.slots[at] = append(g.slots[at], s)
	}
}

func (f *filling) finish() {
	f.rows.ids = newTree(f.edit, f.leaves)
	for i := range f.by {
		g := &f.by[i]
		var leaves []*node[*set]
		for values := range slices.Chunk(sortedKeys(g.at), maxKeys) {
			leaf := &node[*set]{edit: f.edit, keys: slices.Clone(values)}
			for _, value := range values {
				leaf.vals = append(leaf.vals, newSet(f.edit, g.slots[g.at[value]]))
			}
			leaves = append(leaves, leaf)
		}
		f.rows.by[i] = newTree(f.edit, leaves)
	}
}

// newTree makes a tree of leaves in order.
func newTree[V any](e edit, leaves []*node[V]) (t tree[V]) {
	for _, leaf := range leaves {
		t.n += len(leaf.keys)
	}
	level := leaves
	for len(level) > 1 {
		parents := (len(level) + maxKeys - 1) / maxKeys
		each := (len(level) + parents - 1) / parents // so that none has few
		var above []*node[V]
		for kids := range slices.Chunk(level, each) {
			n := &node[V]{edit: e, kids: slices.Clone(kids)}
			for _, kid := range kids {
				n.keys = append(n.keys, kid.keys[0])
			}
			above = append(above, n)
		}
		level = above
	}
	if len(level) == 1 {
		t.root = level[0]
	}
	return t
}

// newSet makes a set of slots that are in the order of their keys.
func newSet(e edit, slots []slot) *set {
	if len(slots) == 1 {
		return setOf(e, slots[0])
	}
	if len(slots) <= maxRun {
		return &set{edit: e, slots: slices.Clone(slots)}
	}
	x := &set{edit: e}
	for run := range slices.Chunk(slots, maxRun) {
		x.runs = append(x.runs, &set{edit: e, slots: slices.Clone(run)})
	}
	return x
}
