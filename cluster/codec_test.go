package cluster

import (
	"bytes"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"testing"

	"github.com/hashicorp/go-msgpack/v2/codec"
)

// random fills a value: nil, empty and filled containers, numbers around the borders of their stored forms, strings of
// all length classes.
func random(r *rand.Rand, v reflect.Value, depth int) {
	some := r.IntN(4) > 0 && depth > 0
	switch v.Kind() {
	case reflect.Bool:
		v.SetBool(r.IntN(2) == 0)
	case reflect.Int, reflect.Int64:
		v.SetInt(int64(number(r)))
	case reflect.Uint, reflect.Uint64:
		v.SetUint(number(r))
	case reflect.Uint16:
		v.SetUint(number(r) & math.MaxUint16)
	case reflect.String:
		v.SetString(text(r))
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Field(i).CanSet() {
				random(r, v.Field(i), depth)
			}
		}
	case reflect.Pointer:
		if some {
			v.Set(reflect.New(v.Type().Elem()))
			random(r, v.Elem(), depth-1)
		}
	case reflect.Uint8:
		v.SetUint(number(r) & math.MaxUint8)
	case reflect.Slice:
		if some {
			v.Set(reflect.MakeSlice(v.Type(), size(r), 30))
			for i := range v.Len() {
				random(r, v.Index(i), depth-1)
			}
		}
	case reflect.Map:
		if some {
			v.Set(reflect.MakeMap(v.Type()))
			for range size(r) {
				e := reflect.New(v.Type().Elem()).Elem()
				random(r, e, depth-1)
				v.SetMapIndex(reflect.ValueOf(text(r)).Convert(v.Type().Key()), e)
			}
		}
	default:
		panic(v.Type())
	}
}

func number(r *rand.Rand) uint64 {
	n := uint64(1)<<r.IntN(64) + uint64(r.IntN(3)) - 1
	if r.IntN(3) == 0 {
		n = -n
	}
	return n
}

func size(r *rand.Rand) int {
	if r.IntN(30) == 0 {
		return 15 + r.IntN(3)
	}
	return r.IntN(4)
}

func text(r *rand.Rand) string {
	n := []int{0, 1, 5, 31, 32, 36, 255, 256}[r.IntN(8)]
	if r.IntN(200) == 0 {
		n = 1 << 16
	}
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.IntN(256))
	}
	return string(b)
}

// kinds makes an empty value of every record and command.
func kinds(t testing.TB) (list []func() any) {
	for _, table := range Tables {
		list = append(list, table.New)
	}
	for kind := range 256 {
		if c := newCommand(Kind(kind)); c != nil {
			list = append(list, func() any { return newCommand(Kind(kind)) })
		}
	}
	if len(list) < 30 {
		t.Fatalf("only %d kinds", len(list))
	}
	return list
}

// TestGeneratedCodec holds the generated code against the reflecting codec, whose bytes older servers have on disk.
func TestGeneratedCodec(t *testing.T) {
	r := rand.New(rand.NewPCG(rand.Uint64(), 1))
	for _, empty := range kinds(t) {
		for i := range 30 {
			v := empty()
			random(r, reflect.ValueOf(v).Elem(), i%7)
			want := marshalByReflection(v)
			if _, ok := appendRecord(nil, v); !ok {
				t.Fatalf("%T has no generated code: run `go generate ./cluster`", v)
			}
			got := Marshal(v)
			if !bytes.Equal(got, want) {
				t.Fatalf("%T\n%+v\n is stored as\n%x\nwant\n%x", v, v, got, want)
			}
			for _, shared := range []*interner{nil, newInterner(4)} {
				back := empty()
				if err := unmarshal(want, back, shared); err != nil {
					t.Fatalf("%T: %v", v, err)
				}
				if again := marshalByReflection(back); !bytes.Equal(again, want) {
					t.Fatalf("%T %+v\n is read as\n%+v", v, v, back)
				}
				ref := empty()
				if err := codec.NewDecoderBytes(want, msgpackHandle).Decode(ref); err != nil {
					t.Fatal(err)
				}
				// Where go-msgpack mixes up values of a map that hold pointers, it is no witness.
				if bytes.Equal(marshalByReflection(ref), want) && !reflect.DeepEqual(back, ref) {
					t.Fatalf("%T is read as\n%+v\nby reflection as\n%+v", v, back, ref)
				}
			}
		}
	}
}

// TestCloneIsDeep clones random records and changes all of the copy.
func TestCloneIsDeep(t *testing.T) {
	r := rand.New(rand.NewPCG(rand.Uint64(), 1))
	for _, empty := range kinds(t) {
		for range 15 {
			v := empty()
			random(r, reflect.ValueOf(v).Elem(), 5)
			want := Marshal(v)
			c := copyRecord(v)
			if reflect.TypeOf(c) != reflect.TypeOf(v) || !reflect.DeepEqual(c, v) {
				t.Fatalf("%T is copied as %+v", v, c)
			}
			spoil(reflect.ValueOf(c).Elem())
			if !bytes.Equal(Marshal(v), want) {
				t.Fatalf("%T changes with its copy", v)
			}
		}
	}
}

// spoil changes all that a value reaches.
func spoil(v reflect.Value) {
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Field(i).CanSet() {
				spoil(v.Field(i))
			}
		}
	case reflect.Pointer:
		if !v.IsNil() {
			spoil(v.Elem())
		}
	case reflect.Slice:
		for i := range v.Len() {
			spoil(v.Index(i))
		}
	case reflect.Map:
		for _, k := range v.MapKeys() {
			if e := v.MapIndex(k); e.Kind() == reflect.Pointer || e.Kind() == reflect.Slice || e.Kind() == reflect.Map {
				spoil(e)
			}
			v.SetMapIndex(k, reflect.Zero(v.Type().Elem()))
		}
	case reflect.Uint8, reflect.Uint16, reflect.Uint64, reflect.Uint:
		v.SetUint(v.Uint() + 1)
	case reflect.Int, reflect.Int64:
		v.SetInt(v.Int() + 1)
	case reflect.String:
		v.SetString(v.String() + "!")
	case reflect.Bool:
		v.SetBool(!v.Bool())
	}
}

// TestPackedAllocations packs random allocations and looks at them whole, stored and copied.
func TestPackedAllocations(t *testing.T) {
	r := rand.New(rand.NewPCG(rand.Uint64(), 1))
	for i := range 300 {
		a := new(Allocation)
		random(r, reflect.ValueOf(a).Elem(), i%7)
		if i%3 == 0 {
			a.TaskStates, a.Metrics = newWorld(3).states(), &AllocMetric{ScoreMetaData: []*NodeScore{{NodeID: "4c1ff4f2-3a1c-4b4f-8f0b-0a7c1c8d9e10"}, nil, {NodeID: "4C1ff4f2-3a1c-4b4f-8f0b-0a7c1c8d9e10"}}}
		}
		want, whole := Marshal(a), Clone(a)
		a.pack()
		if a.TaskStates != nil || a.Metrics != nil {
			t.Fatal("not all was packed")
		}
		if got := a.Whole(); !reflect.DeepEqual(got, whole) {
			t.Fatalf("%+v\n is packed and unpacked\n%+v", whole, got)
		}
		if !bytes.Equal(Marshal(a), want) || !bytes.Equal(Marshal(Clone(a)), want) {
			t.Fatal("a packed allocation is stored in another form")
		}
		a.pack()
		if !reflect.DeepEqual(a.Whole(), whole) || whole.Whole() != whole {
			t.Fatal("what is packed is packed again, or unpacked twice")
		}
	}
}

// TestShortEntries reads random commands in the short form: they mean what they do in the long one.
func TestShortEntries(t *testing.T) {
	r := rand.New(rand.NewPCG(rand.Uint64(), 1))
	for i := range 200 {
		for _, c := range []Command{new(ApplyPlans), new(UpdateAllocs)} {
			random(r, reflect.ValueOf(c).Elem(), i%8)
			none := func(a *Allocation) bool { return a == nil }
			switch c := c.(type) {
			case *ApplyPlans:
				c.Plans = slices.DeleteFunc(c.Plans, func(p *Plan) bool { return p == nil })
				for _, p := range c.Plans {
					p.Place = slices.DeleteFunc(p.Place, none)
					p.Stop, p.Evals = nil, nil // of which rules look at each
				}
			case *UpdateAllocs:
				c.Allocs = slices.DeleteFunc(c.Allocs, none)
				for _, a := range c.Allocs {
					a.TaskStates = trimTaskStates(a.TaskStates)
				}
			}
			long, short := encodeCommand(c, rulesScaling-1), encodeCommand(c, rulesScaling)
			if Kind(long[0]) != c.kind() || Kind(short[0]) == c.kind() {
				t.Fatalf("%T is written as kinds %d and %d", c, long[0], short[0])
			}
			if len(short) > len(long) {
				t.Errorf("%T takes %d bytes in the short form, %d in the long one", c, len(short), len(long))
			}
			back, err := decodeCommand(short, newInterner(4))
			if err != nil {
				t.Fatal(err)
			}
			if again := encodeCommand(back, rulesScaling); !bytes.Equal(again, short) {
				t.Fatalf("%T %+v is read as %+v", c, c, back)
			}
			if again := encodeCommand(back, rulesScaling-1); !bytes.Equal(again, long) {
				t.Fatalf("%T: the short form says other than the long one:\n%x\n%x", c, again, long)
			}
			for n := range min(len(short), 200) { // cut off
				if _, err := DecodeCommand(short[:len(short)-1-n]); err == nil {
					t.Fatalf("%T without its last %d bytes was read", c, n+1)
				}
			}
			if len(long) > 1 {
				mixed := append([]byte{short[0]}, long[1:]...)
				if _, err := DecodeCommand(mixed); err != nil {
					t.Fatalf("a long body in a short entry: %v", err)
				}
			}
		}
	}
}

// TestPackedFieldsAreNotForOthers: only entries and snapshots have packed fields, not what nodes and users send.
func TestPackedFieldsAreNotForOthers(t *testing.T) {
	a := &Allocation{ID: "a", TaskStates: map[string]*TaskState{"t": {State: TaskStateRunning}}}
	a.pack()
	back := new(Allocation)
	if err := Unmarshal(storeAllocation(nil, a), back); err != nil || back.packedStates != "" || back.ID != "a" {
		t.Fatalf("read as %+v, %v", back, err)
	}
}

// TestForNode: a node is told all of an allocation but why it was placed there.
func TestForNode(t *testing.T) {
	states := map[string]*TaskState{"t": {State: TaskStateRunning}}
	a := &Allocation{ID: "a", JobID: "j", TaskStates: states, Metrics: &AllocMetric{NodesEvaluated: 3}}
	a.pack()
	if told := a.ForNode().Whole(); told.Metrics != nil || told.JobID != "j" || !reflect.DeepEqual(told.TaskStates, states) {
		t.Fatalf("the node is told %+v", told)
	}
	if a.Whole().Metrics == nil {
		t.Fatal("the allocation itself has lost its metrics")
	}
}

// TestRecordsAtRest puts random evaluations and deployments into a state: those that have come to their end are kept as
// they are stored, and read as they were put.
func TestRecordsAtRest(t *testing.T) {
	r := rand.New(rand.NewPCG(rand.Uint64(), 1))
	rows := map[*Table]*rows{}
	for i := range 600 {
		table, record := tableByName[TableEvals], any(new(Evaluation))
		if i%2 == 0 {
			table, record = tableByName[TableDeployments], any(new(Deployment))
		}
		random(r, reflect.ValueOf(record).Elem(), i%7)
		ends := i%3 > 0
		switch v := record.(type) {
		case *Evaluation:
			v.ID, v.Status = fmt.Sprint(i), map[bool]string{true: EvalStatusComplete, false: EvalStatusBlocked}[ends]
		case *Deployment:
			v.ID, v.Status = fmt.Sprint(i), map[bool]string{true: DeploymentFailed, false: DeploymentRunning}[ends]
		}
		if rows[table] == nil {
			rows[table] = newRows(table, 1)
		}
		in := rows[table]
		in.put(1, table, fmt.Sprint(i), record)
		s, _ := in.ids.get(fmt.Sprint(i))
		kept := in.records.get(s)
		if _, rests := kept.(*atRest); rests != ends {
			t.Fatalf("%T that has come to its end %v: at rest %v", record, ends, rests)
		}
		if got := in.get(fmt.Sprint(i)); !bytes.Equal(Marshal(got), Marshal(record)) || !bytes.Equal(Marshal(kept), Marshal(record)) {
			t.Fatalf("%+v\n is read as\n%+v", record, got)
		}
		stored := AppendStored(nil, kept)
		if !bytes.Equal(stored, AppendStored(nil, record)) {
			t.Fatal("at rest it is stored in another form")
		}
		row, err := NewReader().Read(table, stored)
		if err != nil || !bytes.Equal(Marshal(row.record), Marshal(record)) {
			t.Fatalf("%+v\n is stored and read as\n%+v, %v", record, row.record, err)
		}
	}
}

// TestEndedOfAJob looks at a job's evaluations by whether they have ended.
func TestEndedOfAJob(t *testing.T) {
	h := newHarness(t)
	eval := func(id, job, status string) *Evaluation {
		return &Evaluation{ID: id, Namespace: "default", JobID: job, Status: status}
	}
	h.must(&UpdateEvals{Evals: []*Evaluation{
		eval("a", "web", EvalStatusComplete), eval("b", "web", EvalStatusBlocked), eval("c", "web", EvalStatusFailed),
		eval("d", "other", EvalStatusComplete),
	}})
	at := func(id string) Ended { return Ended{id, h.Snapshot().Eval(nil, id).ModifyTime} }
	for job, want := range map[string]struct {
		ended []Ended
		open  int
	}{
		"web": {[]Ended{at("a"), at("c")}, 1}, "other": {[]Ended{at("d")}, 0}, "nobody": {nil, 0},
	} {
		k := JobKey{"default", job}
		if ended := h.Snapshot().EndedEvals(k); !slices.Equal(ended, want.ended) {
			t.Errorf("%s: %v have ended; want %+v", job, ended, want)
		}
		if open := h.Snapshot().OpenEvalsByJob(k); len(open) != want.open {
			t.Errorf("%s: %d are open, want %d", job, len(open), want.open)
		}
	}
	if ended := h.Snapshot().EndedDeployments(JobKey{"default", "web"}); len(ended) > 0 {
		t.Errorf("deployments: %v", ended)
	}
}

// TestUnknownFieldsAreSkipped reads records with a field that this version does not know.
func TestUnknownFieldsAreSkipped(t *testing.T) {
	deep := any("end")
	for range maxSkipDepth - 2 {
		deep = []any{deep}
	}
	for _, x := range []any{nil, true, 1, -1, 1 << 40, -1 << 40, 1.5, float32(1.5), "text", text(rand.New(rand.NewPCG(1, 1))), []byte("bin"), []any{1, "a"}, map[string]any{"a": []any{map[string]any{}}}, deep} {
		var b []byte
		if err := codec.NewEncoderBytes(&b, msgpackHandle).Encode(map[string]any{"ID": "x", "Nonsense": x, "Status": "ready"}); err != nil {
			t.Fatal(err)
		}
		n := new(Node)
		if err := Unmarshal(b, n); err != nil || n.ID != "x" || n.Status != "ready" {
			t.Errorf("beside %v: %+v, %v", x, n, err)
		}
	}
	over := any("end")
	for range maxSkipDepth + 2 {
		over = []any{over}
	}
	var b []byte
	if err := codec.NewEncoderBytes(&b, msgpackHandle).Encode(map[string]any{"Nonsense": over}); err != nil {
		t.Fatal(err)
	}
	if err := Unmarshal(b, new(Node)); err == nil {
		t.Error("a record that descends without end was read")
	}
}

// FuzzUnmarshal reads arbitrary bytes as every kind: whatever is read must be stored and read again alike.
func FuzzUnmarshal(f *testing.F) {
	r := rand.New(rand.NewPCG(1, 1))
	all := kinds(f)
	for i, empty := range all {
		v := empty()
		random(r, reflect.ValueOf(v).Elem(), 3)
		f.Add(byte(i), Marshal(v))
	}
	f.Fuzz(func(t *testing.T, kind byte, b []byte) {
		empty := all[int(kind)%len(all)]
		v := empty()
		if Unmarshal(b, v) != nil {
			return
		}
		stored := Marshal(v)
		if !bytes.Equal(stored, marshalByReflection(v)) {
			t.Fatalf("%T: generated code and reflection store it differently", v)
		}
		again := empty()
		if err := Unmarshal(stored, again); err != nil || !bytes.Equal(Marshal(again), stored) {
			t.Fatalf("%T %+v is read back as %+v, %v", v, v, again, err)
		}
	})
}

// TestGeneratedFileIsFresh runs the generator and compares.
func TestGeneratedFileIsFresh(t *testing.T) {
	goTool, err := exec.LookPath("go")
	if err != nil {
		t.Skip("needs the go tool in PATH to run the generator")
	}
	out := filepath.Join(t.TempDir(), "codec_gen.go")
	if text, err := exec.Command(goTool, "run", "./internal/codecgen", out).CombinedOutput(); err != nil { //nolint:gosec // the go tool
		t.Fatalf("%v\n%s", err, text)
	}
	want, err1 := os.ReadFile(out)
	got, err2 := os.ReadFile("codec_gen.go")
	if err1 != nil || err2 != nil || !bytes.Equal(got, want) {
		t.Errorf("codec_gen.go is not what its generator writes: run `go generate ./cluster` (%v, %v)", err1, err2)
	}
}
