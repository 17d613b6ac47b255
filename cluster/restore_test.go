package cluster

import (
	"encoding/hex"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
)

type storedRecord struct {
	table *Table
	bytes []byte
}

// storedState is a state with all that fill makes, and its records as snapshots hold them.
func storedState(t testing.TB) (*State, []storedRecord) {
	s, index := NewState(), uint64(0)
	newWorld(20).fill(t, s, &index, 150, 10, nil) // more allocations on a node than a leaf holds
	var list []storedRecord
	err := s.Snapshot().Records(func(table *Table, _ string, record any) error {
		list = append(list, storedRecord{table, AppendStored(nil, record)})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return s, list
}

func restore(t testing.TB, list []storedRecord) *State {
	t.Helper()
	r := NewRestore()
	for _, x := range list {
		if err := r.Add(x.table, x.bytes); err != nil {
			t.Fatal(err)
		}
	}
	s, err := r.Done()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// indexed is what all indexes of a state give, by table, index and value.
func indexed(s *State) map[string][]string {
	out := map[string][]string{}
	v := s.Snapshot().txn
	for _, t := range Tables {
		for i, x := range t.indexes {
			r := v.rows[t.number]
			r.by[i].ascend("", func(value string, set *set) bool {
				set.each(func(at slot) bool {
					name := t.Name + "/" + x.name + "/" + value
					out[name] = append(out[name], t.key(r.at(at)))
					return true
				})
				return true
			})
		}
	}
	return out
}

// TestRestoreInAnyOrder restores records as they come from a snapshot, and shuffled: it is the same state, which goes
// on working.
func TestRestoreInAnyOrder(t *testing.T) {
	s, list := storedState(t)
	shuffled := slices.Clone(list)
	seeded(t).Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
	twice := slices.Clone(list)
	for _, x := range list {
		if x.table.Name == TableAllocs {
			twice = append(twice, x) // takes the place of the same
		}
	}
	for name, records := range map[string][]storedRecord{"in order": list, "shuffled": shuffled, "some twice": twice} {
		got := restore(t, records)
		if got.Snapshot().Hash() != s.Snapshot().Hash() {
			t.Errorf("%s: another state is restored", name)
		}
		if !reflect.DeepEqual(indexed(got), indexed(s)) {
			t.Errorf("%s: the indexes differ", name)
		}
		index := s.Snapshot().Index(nil)
		snap := got.Snapshot()
		var gone []*Allocation
		for i, a := range snap.Allocs(nil, "") {
			if i%3 == 0 {
				gone = append(gone, &Allocation{ID: a.ID, NodeID: a.NodeID, ClientStatus: AllocClientComplete})
			}
		}
		must(t, got, index+1, &UpdateAllocs{Stamp: Stamp{RequestID: "done", Time: 1}, Allocs: gone})
		if err := got.Snapshot().Check(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := snap.Check(); err != nil {
			t.Errorf("%s: a view changed: %v", name, err)
		}
	}
}

func must(t testing.TB, s *State, index uint64, c Command) {
	t.Helper()
	if res, err := s.Apply(index, EncodeCommand(c)); err != nil || res.Err != nil {
		t.Fatal(err, res.Err)
	}
}

// TestStoredForm stores random records as snapshots do, and reads them as they were.
func TestStoredForm(t *testing.T) {
	r := seeded(t)
	reader := NewReader()
	for _, table := range Tables {
		for i := range 100 {
			v := table.New()
			random(r, reflect.ValueOf(v).Elem(), i%7)
			if table.key(v) == "" {
				continue
			}
			want := Marshal(v)
			if a, ok := v.(*Allocation); ok && i%2 == 0 {
				a.pack()
			}
			stored := AppendStored([]byte("x"), v)[1:]
			row, err := reader.Read(table, stored)
			if err != nil {
				t.Fatalf("%s: %v\n%x", table.Name, err, stored)
			}
			if row.Key != table.key(v) || table.Name != TableSummaries && string(Marshal(row.record)) != string(want) {
				t.Fatalf("%s:\n%+v\nis read as\n%+v", table.Name, v, row.record)
			}
			if row, err = reader.Read(table, want); err != nil || table.Name != TableSummaries && string(Marshal(row.record)) != string(want) {
				t.Fatalf("%s: the form of older snapshots is not read: %v", table.Name, err)
			}
		}
	}
}

// TestPackedFormStays reads allocations with packed fields that were written once; -update adds none, since what is
// there must be readable for ever.
func TestPackedFormStays(t *testing.T) {
	path := filepath.Join("testdata", "packed.hex")
	if *update {
		if _, err := os.Stat(path); err != nil {
			w := newWorld(3)
			a := w.alloc(w.job(1), &Evaluation{ID: w.uuid()}, w.uuid(), 1)
			a.TaskStates = w.states()
			want := hex.EncodeToString(Marshal(a))
			a.pack()
			if err := os.WriteFile(path, []byte(hex.EncodeToString(AppendStored(nil, a))+"\n"+want+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Fields(string(text))
	stored, err1 := hex.DecodeString(lines[0])
	whole, err2 := hex.DecodeString(lines[1])
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	row, err := NewReader().Read(tableByName[TableAllocs], stored)
	if err != nil {
		t.Fatal(err)
	}
	want := new(Allocation)
	if err := Unmarshal(whole, want); err != nil {
		t.Fatal(err)
	}
	if got := row.record.(*Allocation).Whole(); !reflect.DeepEqual(got, want) {
		t.Errorf("a stored allocation is read as\n%+v\nwant\n%+v", got, want)
	}
}

// TestDamagedPackedFields changes packed fields: what the look at them lets pass can be unpacked, and nothing panics.
func TestDamagedPackedFields(t *testing.T) {
	r := seeded(t)
	w := newWorld(3)
	refused := 0
	for range 20000 {
		a := w.alloc(w.job(1), &Evaluation{ID: w.uuid()}, w.uuid(), 1)
		a.TaskStates = w.states()
		a.pack()
		damage := func(s string) string {
			b := []byte(s)
			switch r.IntN(4) {
			case 0:
				return string(b[:r.IntN(len(b))])
			case 1:
				return string(append(b, byte(r.IntN(256))))
			default:
				b[r.IntN(len(b))] = byte(r.IntN(256))
				return string(b)
			}
		}
		a.packedStates, a.packedMetrics = damage(a.packedStates), damage(a.packedMetrics)
		a.Whole()
		_, err := (&Reader{newInterner(4)}).Read(tableByName[TableAllocs], AppendStored(nil, a))
		if err != nil {
			refused++
			continue
		}
		for s, shape := range map[string]*shape{a.packedStates: &packedStatesShape, a.packedMetrics: &packedMetricsShape} {
			if s == "" {
				continue // is not stored
			}
			u := unpacker{left: s}
			if shape == &packedStatesShape {
				unpackMap(&u, func(u *unpacker) *TaskState { return unpackPtr(u, unpackTaskState) })
			} else {
				unpackPtr(&u, unpackAllocMetric)
			}
			if u.bad || u.left != "" {
				t.Fatalf("%x passes as whole, but cannot be unpacked", s)
			}
		}
	}
	if refused < 5000 {
		t.Errorf("only %d of 20000 damaged records were refused", refused)
	}
}

// TestSpecEqualSeesEveryField changes one field after the other of a job that shares its parts with another.
func TestSpecEqualSeesEveryField(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	own := []string{"Status", "StatusDescription", "Stable", "Version", "SubmitTime", "CreateIndex", "ModifyIndex", "JobModifyIndex", "VersionTag"}
	a := newWorld(1).job(1)
	for i := range reflect.TypeOf(*a).NumField() {
		name := reflect.TypeOf(*a).Field(i).Name
		b := *a
		f := reflect.ValueOf(&b).Elem().Field(i)
		for reflect.DeepEqual(f.Interface(), reflect.ValueOf(*a).Field(i).Interface()) || f.Kind() == reflect.Slice && f.Len() == 0 {
			random(r, f, 3)
		}
		if got := SpecEqual(a, &b); got != slices.Contains(own, name) {
			t.Errorf("jobs that differ in %s: SpecEqual says %v", name, got)
		}
	}
}
