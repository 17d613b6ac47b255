package cluster

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/go-msgpack/v2/codec"
)

func seeded(t testing.TB) *rand.Rand {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 1))
}

// TestTreeAgainstMap drives a tree and a map alike, and looks again at older copies.
func TestTreeAgainstMap(t *testing.T) {
	r := seeded(t)
	type moment struct {
		tree  tree[int]
		model map[string]int
	}
	var past []moment
	now, model := tree[int]{}, map[string]int{}
	key := func() string {
		if r.IntN(2) == 0 {
			return fmt.Sprintf("%04d", r.IntN(2000))
		}
		return fmt.Sprintf("p%d/%c", r.IntN(40), 'a'+r.IntN(20))
	}
	for step := range 20000 {
		e := edit(step/(1+r.IntN(30)) + 1) // many changes in one write, few in others
		shrink := step%8000 > 5000
		if k := key(); r.IntN(3) == 0 || shrink && r.IntN(3) > 0 {
			_, want := model[k]
			if got := now.delete(e, k); got != want {
				t.Fatalf("delete %s gave %v", k, got)
			}
			delete(model, k)
		} else {
			_, known := model[k]
			if added := now.set(e, k, step); added == known {
				t.Fatalf("set %s gave added=%v", k, added)
			}
			model[k] = step
		}
		if r.IntN(200) == 0 {
			past = append(past, moment{now, maps.Clone(model)})
			now = tree[int]{n: now.n}
			for k, v := range model { // an edit that made nodes of a copy must not be used again
				now.set(edit(1<<40+step), k, v)
			}
			past = append(past, moment{now, maps.Clone(model)})
		}
	}
	past = append(past, moment{now, model})
	for _, m := range past {
		for _, prefix := range []string{"", "0", "1", "01", "p", "p1", "p1/", "p39/", "zz", "1999", "p5/c"} {
			var want, got []string
			for _, k := range slices.Sorted(maps.Keys(m.model)) {
				if strings.HasPrefix(k, prefix) {
					want = append(want, k)
				}
			}
			m.tree.ascend(prefix, func(k string, v int) bool {
				if v != m.model[k] {
					t.Fatalf("%s is %d, want %d", k, v, m.model[k])
				}
				got = append(got, k)
				return true
			})
			if !slices.Equal(got, want) {
				t.Fatalf("prefix %q:\n%v\nwant\n%v", prefix, got, want)
			}
			want, got = nil, nil
			for _, k := range slices.Sorted(maps.Keys(m.model)) {
				if k >= prefix {
					want = append(want, k)
				}
			}
			m.tree.from(prefix, func(k string, _ int) bool {
				got = append(got, k)
				return true
			})
			if !slices.Equal(got, want) {
				t.Fatalf("from %q:\n%v\nwant\n%v", prefix, got, want)
			}
		}
		for k, v := range m.model {
			if got, ok := m.tree.get(k); !ok || got != v {
				t.Fatalf("%s is %d (%v), want %d", k, got, ok, v)
			}
		}
	}
}

// TestRowsAgainstMap drives a table with indexes whose values have few or many records, and looks again at older copies.
func TestRowsAgainstMap(t *testing.T) {
	r := seeded(t)
	type record struct{ id, few, many string }
	table := &Table{Name: "test", key: func(v any) string { return v.(*record).id }}
	table.indexes = []secondary{
		{"few", func(v any) string { return v.(*record).few }},
		{"many", func(v any) string { return v.(*record).many }},
	}
	type moment struct {
		rows  rows
		model map[string]*record
	}
	now, model := *newRows(table, 0), map[string]*record{}
	var past []moment
	for step := range 30000 {
		e := edit(step/10 + 1)
		if now.edit != e {
			now.edit, now.by = e, slices.Clone(now.by)
		}
		id := fmt.Sprintf("%05d", r.IntN(6000))
		if r.IntN(3) == 0 {
			if got := now.delete(e, table, id); (got != nil) != (model[id] != nil) {
				t.Fatalf("delete %s gave %v", id, got)
			}
			delete(model, id)
		} else {
			rec := &record{id, fmt.Sprint(r.IntN(900)), []string{"", "one", "two"}[r.IntN(3)]}
			if got := now.put(e, table, id, rec); (got != nil) != (model[id] != nil) || got != nil && got != model[id] {
				t.Fatalf("put %s gave %v, want %v", id, got, model[id])
			}
			model[id] = rec
		}
		if step%10 == 9 && r.IntN(150) == 0 {
			past = append(past, moment{now, maps.Clone(model)})
		}
	}
	past = append(past, moment{now, model})
	for _, m := range past {
		v := &view{rows: []*rows{&m.rows}}
		for by, value := range map[string]string{"few": "7", "many": "two"} {
			q := query{table: table, value: value, by: slices.IndexFunc(table.indexes, func(x secondary) bool { return x.name == by })}
			var want, got []any
			for _, id := range slices.Sorted(maps.Keys(m.model)) {
				if rec := m.model[id]; table.indexes[q.by].of(rec) == value {
					want = append(want, rec)
				}
			}
			v.scan(q, func(rec any) bool { got = append(got, rec); return true })
			if !slices.Equal(got, want) {
				t.Fatalf("%s %s holds %d records, want %d", by, value, len(got), len(want))
			}
		}
		n := 0
		v.scan(query{table: table, by: 0, prefix: true}, func(any) bool { n++; return true })
		if n != len(m.model) || m.rows.ids.n != len(m.model) {
			t.Fatalf("index has %d records, table %d, want %d", n, m.rows.ids.n, len(m.model))
		}
	}
}

// TestBatchIsASequence applies one log entry by entry and in batches, with refused commands and repeated entries in
// it: after every batch the states must have the same records, and every entry the same result.
func TestBatchIsASequence(t *testing.T) {
	r := seeded(t)
	var log [][]byte
	for i, entry := range randomLog(newHarness(t), r) {
		log = append(log, entry)
		switch r.IntN(12) {
		case 0:
			log = append(log, log[r.IntN(len(log))])
		case 1: // refused after it has written: the second follower's model is gone
			log = append(log, refusedLate(t, i)...)
		case 2:
			for _, c := range []Command{&UpdateDrain{NodeID: "nope"}, &SetJobStability{JobID: "nope"}, &RegisterJob{Job: testJob("job-1", 1), EnforceIndex: true, JobModifyIndex: 1 << 40}} {
				*c.stamp() = Stamp{RequestID: fmt.Sprintf("refused-%d-%T", i, c), Time: 1}
				log = append(log, EncodeCommand(c))
			}
		}
	}
	single, batched := NewState(), NewState()
	refused := 0
	for at := 0; at < len(log); {
		n := min(1+r.IntN(64), len(log)-at)
		var batch []Entry
		var want []Result
		for i := range n {
			index := uint64(at + i + 1)
			res, err := single.Apply(index, log[at+i])
			if err != nil {
				t.Fatal(err)
			}
			if res.Err != nil {
				refused++
			}
			want, batch = append(want, res), append(batch, Entry{index, log[at+i]})
		}
		before, was := batched.Snapshot(), ""
		if r.IntN(8) == 0 {
			was = dump(t, batched)
		}
		got, err := batched.ApplyBatch(batch)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Fatalf("batch of %d at %d: %v\n%+v\nwant\n%+v", n, at, err, got, want)
		}
		if batched.Snapshot().Hash() != single.Snapshot().Hash() {
			t.Fatalf("after the batch of %d at %d the states differ", n, at)
		}
		if was != "" && dumpOf(t, before) != was {
			t.Fatal("an older snapshot changed")
		}
		at += n
	}
	if refused == 0 {
		t.Error("no command was refused")
	}
	if err := batched.Snapshot().Check(); err != nil {
		t.Error(err)
	}
}

// refusedLate is a command that is refused when it has already written, behind what it needs for that.
func refusedLate(t testing.TB, i int) (log [][]byte) {
	model := fmt.Sprintf("late-%d", i)
	follower := testJob("follows-"+model, 1)
	follower.TaskGroups[0].Tasks[0].Model = &ModelRef{Reference: model + "@a", Name: model, Alias: "a"}
	for n, c := range []Command{
		&CreateModelVersion{Version: &ModelVersion{Model: model, Digest: "sha256:" + strings.Repeat("a", 64)}},
		&SetAlias{Model: model, Alias: "a", Version: 1},
		&RegisterJob{Job: follower},
		&SetAlias{Model: model, Alias: "a", Version: 9},
		&SetAlias{Model: model, Alias: "a"},
	} {
		*c.stamp() = Stamp{RequestID: fmt.Sprintf("%s-%d", model, n), Time: 1}
		log = append(log, EncodeCommand(c))
	}
	return log
}

// TestSharedPartsStay applies random commands and looks whether a rule has changed what records share.
func TestSharedPartsStay(t *testing.T) {
	h := newHarness(t)
	randomLog(h, seeded(t))
	n := 0
	for _, slot := range append(restoreOf(t, h.State).shared.values, h.shared.values...) {
		if slot.v == nil {
			continue
		}
		n++
		was := reflect.New(reflect.TypeOf(slot.v)) // what is stored may be without what is zero
		if err := codec.NewDecoderBytes([]byte(slot.stored), msgpackHandle).Decode(was.Interface()); err != nil {
			t.Fatal(err)
		}
		if got, want := marshalByReflection(slot.v), marshalByReflection(was.Elem().Interface()); !bytes.Equal(got, want) {
			t.Errorf("a shared %T has become\n%x\nfrom\n%x", slot.v, got, want)
		}
	}
	if n < 3 {
		t.Errorf("only %d values are shared", n)
	}
}

// TestUndo puts, replaces and deletes records in a batch and takes it back.
func TestUndo(t *testing.T) {
	h := newHarness(t)
	r := seeded(t)
	randomLog(h, r)
	want := dump(t, h.State)
	b := h.begin()
	all := h.Snapshot().Evals(nil, "")
	evals := tableByName[TableEvals]
	tx := &tx{Snapshot: &Snapshot{txn: b.view}, batch: b, index: 1 << 40}
	for i := range 500 {
		switch e := all[r.IntN(len(all))]; r.IntN(3) {
		case 0:
			tx.delete(TableEvals, e)
		case 1:
			c := *e
			c.Status, c.JobID = EvalStatusBlocked, fmt.Sprint("job-", r.IntN(20))
			tx.put(TableEvals, &c)
		case 2:
			tx.put(TableEvals, &Evaluation{ID: fmt.Sprint("new-", i), Status: EvalStatusPending, JobID: "job-1", Namespace: "default"})
		}
	}
	b.undo(0)
	b.commit()
	if got := dump(t, h.State); got != want {
		t.Error("not all was taken back")
	}
	for i, x := range evals.indexes {
		n := 0
		h.Snapshot().txn.scan(query{table: evals, by: i, prefix: true}, func(any) bool { n++; return true })
		want := 0
		for _, e := range h.Snapshot().Evals(nil, "") {
			if x.of(e) != "" {
				want++
			}
		}
		if n != want {
			t.Errorf("index %s holds %d records, want %d", x.name, n, want)
		}
	}
}

func TestBatchStopsAtAnUnknownEntry(t *testing.T) {
	s := NewState()
	entry := func(id string) []byte {
		return EncodeCommand(&RegisterJob{Stamp: Stamp{RequestID: id, Time: 1}, Job: testJob(id, 1), EvalID: "e-" + id})
	}
	res, err := s.ApplyBatch([]Entry{{5, entry("a")}, {6, entry("b")}, {7, []byte{250, 0x80}}, {8, entry("c")}})
	if err == nil || !strings.Contains(err.Error(), "log index 7: ") || len(res) != 2 {
		t.Fatalf("%d results, error %v", len(res), err)
	}
	if jobs := s.Snapshot().Jobs(nil, "*", ""); len(jobs) != 2 || s.Snapshot().Index(nil) != 6 {
		t.Errorf("%d jobs at index %d", len(jobs), s.Snapshot().Index(nil))
	}
}

func TestResultsAreBounded(t *testing.T) {
	const max, over = 4000, 2500
	s := NewState()
	s.keep = max
	var batch []Entry
	id := func(i int) string { return fmt.Sprintf("r-%d", i) }
	for i := range max + over {
		c := &Reap{Stamp: Stamp{RequestID: id(i), Time: 1}}
		batch = append(batch, Entry{uint64(i + 1), EncodeCommand(c)})
		if len(batch) == 64 || i == max+over-1 {
			if _, err := s.ApplyBatch(batch); err != nil {
				t.Fatal(err)
			}
			batch = nil
		}
	}
	restored := restoreOf(t, s)
	restored.keep = max
	for _, s := range []*State{s, restored} {
		n := 0
		last := ""
		err := s.Snapshot().Records(func(tab *Table, key string, _ any) error {
			if tab.Name == TableResults {
				n++
				if key <= last {
					t.Fatalf("%s comes behind %s", key, last)
				}
				last = key
			}
			return nil
		})
		if err != nil || n != max || len(s.kept) != n {
			t.Fatalf("%d results (%d known) are kept: %v", n, len(s.kept), err)
		}
		repeat := func(i int) uint64 {
			res, err := s.Apply(1<<30, EncodeCommand(&Reap{Stamp: Stamp{RequestID: id(i), Time: 1}}))
			if err != nil {
				t.Fatal(err)
			}
			return res.Index
		}
		if repeat(over) != over+1 || repeat(max+over-1) != max+over {
			t.Error("a kept result was forgotten")
		}
		if repeat(over-1) != 1<<30 {
			t.Error("a result beyond the bound was kept")
		}
	}
}

func restoreOf(t testing.TB, s *State) *State {
	t.Helper()
	r := NewRestore()
	if err := s.Snapshot().Records(func(tab *Table, _ string, rec any) error { return r.Add(tab, Marshal(rec)) }); err != nil {
		t.Fatal(err)
	}
	restored, err := r.Done()
	if err != nil {
		t.Fatal(err)
	}
	return restored
}

// hasFired says whether any channel of the set is closed.
func hasFired(ws WatchSet) bool {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	for ch := range ws {
		select {
		case <-ch:
			return true
		default:
		}
	}
	return ws.WatchCtx(ctx) == nil
}

// reads are all the ways to read, with values that the random commands meet.
func reads(r *rand.Rand, s *Snapshot) map[string]func(*Snapshot, WatchSet) []any {
	pick := func(list []string) string {
		if len(list) == 0 || r.IntN(8) == 0 {
			return "nobody"
		}
		return list[r.IntN(len(list))]
	}
	var allocs, evals, nodes, deployments []string
	for _, a := range s.Allocs(nil, "") {
		allocs = append(allocs, a.ID)
	}
	for _, e := range s.Evals(nil, "") {
		evals = append(evals, e.ID)
	}
	for _, n := range s.Nodes(nil, "") {
		nodes = append(nodes, n.ID)
	}
	for _, d := range s.Deployments(nil, "") {
		deployments = append(deployments, d.ID)
	}
	k := JobKey{"default", fmt.Sprintf("job-%d", r.IntN(8))}
	a, e, n, d := pick(allocs), pick(evals), pick(nodes), pick(deployments)
	version := uint64(r.IntN(4))
	return map[string]func(*Snapshot, WatchSet) []any{
		"node":                 func(s *Snapshot, ws WatchSet) []any { return one(s.Node(ws, n)) },
		"nodes":                func(s *Snapshot, ws WatchSet) []any { return many(s.Nodes(ws, "")) },
		"job":                  func(s *Snapshot, ws WatchSet) []any { return one(s.Job(ws, k)) },
		"jobs":                 func(s *Snapshot, ws WatchSet) []any { return many(s.Jobs(ws, "default", "job-1")) },
		"version":              func(s *Snapshot, ws WatchSet) []any { return one(s.JobVersion(ws, k, version)) },
		"versions":             func(s *Snapshot, ws WatchSet) []any { return many(s.JobVersions(ws, k)) },
		"summary":              func(s *Snapshot, ws WatchSet) []any { return one(s.Summary(ws, k)) },
		"eval":                 func(s *Snapshot, ws WatchSet) []any { return one(s.Eval(ws, e)) },
		"evals":                func(s *Snapshot, ws WatchSet) []any { return many(s.Evals(ws, e[:5])) },
		"job's evals":          func(s *Snapshot, ws WatchSet) []any { return many(s.EvalsByJob(ws, k)) },
		"open evals":           func(s *Snapshot, ws WatchSet) []any { return many(s.OpenEvals(ws)) },
		"alloc":                func(s *Snapshot, ws WatchSet) []any { return []any{string(Marshal(s.Alloc(ws, a)))} },
		"allocs":               func(s *Snapshot, ws WatchSet) []any { return many(s.Allocs(ws, a[:6])) },
		"job's allocs":         func(s *Snapshot, ws WatchSet) []any { return many(s.AllocsByJob(ws, k)) },
		"node's allocs":        func(s *Snapshot, ws WatchSet) []any { return many(s.AllocsByNode(ws, n)) },
		"holding":              func(s *Snapshot, ws WatchSet) []any { return many(s.AllocsHolding(ws, n)) },
		"eval's allocs":        func(s *Snapshot, ws WatchSet) []any { return many(s.AllocsByEval(ws, e)) },
		"deployment's allocs":  func(s *Snapshot, ws WatchSet) []any { return many(s.AllocsByDeployment(ws, d)) },
		"deployment":           func(s *Snapshot, ws WatchSet) []any { return one(s.Deployment(ws, d)) },
		"active deployments":   func(s *Snapshot, ws WatchSet) []any { return many(s.ActiveDeployments(ws)) },
		"job's deployments":    func(s *Snapshot, ws WatchSet) []any { return many(s.DeploymentsByJob(ws, k)) },
		"nodes' index":         func(s *Snapshot, ws WatchSet) []any { return []any{s.Index(ws, TableNodes)} },
		"evals', jobs' index":  func(s *Snapshot, ws WatchSet) []any { return []any{s.Index(ws, TableEvals), s.Index(ws, TableJobs)} },
		"the state's index":    func(s *Snapshot, ws WatchSet) []any { return []any{s.Index(ws)} },
		"where there are none": func(s *Snapshot, ws WatchSet) []any { return many(s.AllocsByNode(ws, "nobody")) },
	}
}

func one[T any](v *T) []any { return many([]*T{v}) }

func many[T any](list []*T) (all []any) {
	for _, v := range list {
		if rests := any(v); v != nil && (is[*Evaluation](rests) || is[*Deployment](rests)) {
			all = append(all, string(Marshal(v))) // one at rest is another value each time
		} else {
			all = append(all, v)
		}
	}
	return all
}

func is[T any](v any) bool { _, ok := v.(T); return ok }

// TestWatchesFireForTheirChangeOnly registers all kinds of watches between random commands, on the newest snapshot and
// on older ones: each must fire exactly when what it read has become something else.
func TestWatchesFireForTheirChangeOnly(t *testing.T) {
	r := seeded(t)
	log := randomLog(newHarness(t), r)
	s := NewState()
	type waiting struct {
		name string
		at   int
		read func(*Snapshot, WatchSet) []any
		saw  []any
		old  bool // it was something else already when the watch began
		ws   WatchSet
	}
	var all []*waiting
	var older []*Snapshot
	woken, still := 0, 0
	for i, entry := range log {
		snap := s.Snapshot()
		if older = append(older, snap); len(older) > 4 {
			older = older[1:]
		}
		for name, read := range reads(r, snap) {
			if r.IntN(4) == 0 {
				w := &waiting{name: name, at: i, read: read, ws: WatchSet{}}
				w.saw = read(older[r.IntN(len(older))], w.ws)
				w.old = !slices.Equal(read(snap, nil), w.saw)
				all = append(all, w)
			}
		}
		if _, err := s.Apply(uint64(i+1), entry); err != nil {
			t.Fatal(err)
		}
		now := s.Snapshot()
		all = slices.DeleteFunc(all, func(w *waiting) bool {
			changed, fired := w.old || !slices.Equal(w.read(now, nil), w.saw), hasFired(w.ws)
			if changed != fired {
				t.Fatalf("%s, read at %d, at %d: changed %v, fired %v", w.name, w.at, i, changed, fired)
			}
			if fired {
				woken++
			}
			return fired || r.IntN(50) == 0
		})
		still += len(all)
	}
	if woken == 0 || still == 0 {
		t.Errorf("%d woken, %d not", woken, still)
	}
}

// TestOpenEvalsFrom: a reader that has seen an older state reads on from there and
// misses nothing, and its watch fires for every change of an open evaluation.
func TestOpenEvalsFrom(t *testing.T) {
	r := seeded(t)
	s := NewState()
	ws := WatchSet{}
	seen := s.Snapshot().OpenEvals(nil)
	s.Snapshot().OpenEvalsFrom(ws, 1)
	news, still := 0, 0
	for i, entry := range randomLog(newHarness(t), r) {
		before := s.Snapshot()
		if _, err := s.Apply(uint64(i+1), entry); err != nil {
			t.Fatal(err)
		}
		now := s.Snapshot()
		open := now.OpenEvals(nil)
		changed := !slices.Equal(open, seen)
		if fired := hasFired(ws); changed && !fired {
			t.Fatalf("at %d the open evaluations have changed and nobody is told", i)
		} else if !fired {
			still++
			continue
		}
		seen, ws = open, WatchSet{}
		for _, snap := range []*Snapshot{now, before} { // the second registers too late
			from := uint64(r.IntN(i + 3))
			var want []*Evaluation
			for _, e := range snap.OpenEvals(nil) {
				if e.ModifyIndex >= from {
					want = append(want, e)
				}
			}
			if got := snap.OpenEvalsFrom(ws, from); !slices.Equal(got, want) {
				t.Fatalf("at %d from %d: %d evaluations, want %d", i, from, len(got), len(want))
			}
			if len(want) > 0 {
				news++
			}
			if snap == now && hasFired(ws) {
				t.Fatalf("at %d a fresh watch has fired", i)
			}
		}
		if changed && !hasFired(ws) {
			t.Fatalf("at %d a watch on the state before does not tell that it has changed", i)
		}
		ws = WatchSet{}
		now.OpenEvalsFrom(ws, 1<<60)
	}
	if news == 0 || still == 0 {
		t.Errorf("%d looks with news, %d changes that are none of its", news, still)
	}
}

func TestRefusedCommandWakesNobody(t *testing.T) {
	h := newHarness(t)
	h.must(&RegisterJob{Job: testJob("a", 1), EvalID: h.id()})
	ws := WatchSet{}
	h.Snapshot().Jobs(ws, "*", "")
	h.Snapshot().Index(ws, TableJobs, TableEvals, TableModels)
	h.do(&SetAlias{Model: "nope"})
	if hasFired(ws) {
		t.Error("a refused command woke who waits for jobs")
	}
}

func TestWatchesAreBounded(t *testing.T) {
	h := newHarness(t)
	h.hub.max = 10
	first := WatchSet{}
	h.Snapshot().Job(first, JobKey{"default", "nobody-0"})
	for i := range 10 {
		h.Snapshot().Job(WatchSet{}, JobKey{"default", fmt.Sprintf("nobody-%d", i)})
	}
	if h.hub.n > 10 || hasFired(first) {
		t.Fatalf("%d channels, fired %v", h.hub.n, hasFired(first))
	}
	h.Snapshot().Node(WatchSet{}, "nobody")
	if h.hub.n != 1 || !hasFired(first) {
		t.Errorf("%d channels, the oldest fired %v", h.hub.n, hasFired(first))
	}
}
