package ort

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"math"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/rxvision/rxvision/oip"
	"github.com/rxvision/rxvision/serve/ort/onnxtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// logs collects what ONNX Runtime logged.
var logs struct {
	sync.Mutex
	bytes.Buffer
}

type lockedLog struct{}

func (lockedLog) Write(p []byte) (int, error) {
	logs.Lock()
	defer logs.Unlock()
	return logs.Buffer.Write(p)
}

func load(tb testing.TB) {
	tb.Helper()
	if err := Load(onnxtest.Library(tb), slog.New(slog.NewTextHandler(lockedLog{}, nil))); err != nil {
		tb.Fatal(err)
	}
}

func open(tb testing.TB, m onnxtest.Model) *Session {
	tb.Helper()
	load(tb)
	s, err := Open(m.Write(tb), Options{})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(s.Close)
	return s
}

func TestTelemetryIsOff(t *testing.T) {
	load(t)
	if !telemetryOff() || os.Getenv("ORT_DISABLE_TELEMETRY") != "1" {
		t.Error("ORT_DISABLE_TELEMETRY is not 1 in the environment that C sees")
	}
	if !strings.HasPrefix(Version(), "1.") {
		t.Errorf("version %q", Version())
	}
}

func TestLoadFaults(t *testing.T) {
	if err := Load("", nil); err == nil || err.Error() != "load ONNX Runtime: no path of the library is given" {
		t.Error(err)
	}
	if err := Load("/none/lib.so", nil); err == nil || !errors.Is(err, os.ErrNotExist) && Version() == "" {
		t.Error(err)
	}
	load(t)
	load(t) // the same again is fine
	if err := Load("/proc/self/exe", nil); err == nil || !strings.Contains(err.Error(), "this process has loaded it from") {
		t.Error(err)
	}
}

func raw(v any) []byte {
	b, err := binary.Append(nil, binary.LittleEndian, v)
	if err != nil {
		panic(err)
	}
	return b
}

func TestEveryType(t *testing.T) {
	for _, tc := range []struct {
		elem uint64
		d    oip.Datatype
		data []byte
	}{
		{onnxtest.Bool, oip.BOOL, []byte{1, 0}},
		{onnxtest.Uint8, oip.UINT8, []byte{0, 255}},
		{onnxtest.Uint16, oip.UINT16, raw([]uint16{1, 65535})},
		{onnxtest.Uint32, oip.UINT32, raw([]uint32{1, math.MaxUint32})},
		{onnxtest.Uint64, oip.UINT64, raw([]uint64{1, math.MaxUint64})},
		{onnxtest.Int8, oip.INT8, raw([]int8{-128, 127})},
		{onnxtest.Int16, oip.INT16, raw([]int16{-32768, 32767})},
		{onnxtest.Int32, oip.INT32, raw([]int32{math.MinInt32, math.MaxInt32})},
		{onnxtest.Int64, oip.INT64, raw([]int64{math.MinInt64, math.MaxInt64})},
		{onnxtest.Float16, oip.FP16, raw([]uint16{0x3c00, 0x7e01})},
		{onnxtest.BFloat, oip.BF16, raw([]uint16{0x3f80, 0x7fc1})},
		{onnxtest.Float, oip.FP32, raw([]float32{-1.5, math.MaxFloat32})},
		{onnxtest.Double, oip.FP64, raw([]float64{0.1, math.MaxFloat64})},
		{onnxtest.String, oip.BYTES, oip.FromStrings("", nil, "", "a\x00b\xff").Data},
	} {
		t.Run(string(tc.d), func(t *testing.T) {
			half := len(tc.data) / 2
			if tc.d == oip.BYTES {
				half = 4
			}
			for name, shapes := range map[string]struct {
				dims, shape []int64
				data        []byte
			}{
				"fixed":    {[]int64{1, 2}, []int64{1, 2}, tc.data},
				"dynamic":  {[]int64{-1}, []int64{2}, tc.data},
				"any rank": {nil, []int64{2, 1, 1}, tc.data},
				"scalar":   {[]int64{}, []int64{}, tc.data[:half]},
				"empty":    {[]int64{-1, 3}, []int64{0, 3}, []byte{}},
			} {
				s := open(t, onnxtest.Identity(tc.elem, shapes.dims))
				if got := s.Inputs()[0]; got.Datatype != tc.d || !reflect.DeepEqual(append([]int64{}, got.Shape...), append([]int64{}, shapes.dims...)) {
					t.Errorf("%s: described as %+v", name, got)
				}
				// One byte off, as binary data may lie in a message.
				data := append([]byte{0}, shapes.data...)[1:]
				out, err := s.Run(context.Background(), []oip.Tensor{{Name: "x", Datatype: tc.d, Shape: shapes.shape, Data: data}}, nil)
				want := []oip.Tensor{{Name: "y", Datatype: tc.d, Shape: shapes.shape, Data: shapes.data}}
				if err != nil || !reflect.DeepEqual(out, want) {
					t.Errorf("%s: got %+v, %v\nwant %+v", name, out, err, want)
				}
			}
		})
	}
}

// add is a model with two inputs and two outputs: sum = a + b, copy = a.
func add(dims ...int64) onnxtest.Model {
	return onnxtest.Model{
		Nodes: []onnxtest.Node{
			{Op: "Add", Inputs: []string{"a", "b"}, Outputs: []string{"sum"}},
			{Op: "Identity", Inputs: []string{"a"}, Outputs: []string{"copy"}},
		},
		Inputs:   []onnxtest.Value{{Name: "a", Elem: onnxtest.Float, Dims: dims}, {Name: "b", Elem: onnxtest.Float, Dims: dims}},
		Outputs:  []onnxtest.Value{{Name: "sum", Elem: onnxtest.Float, Dims: dims}, {Name: "copy", Elem: onnxtest.Float, Dims: dims}},
		Metadata: [][2]string{{"rxvision.labels", `["a","b"]`}, {"empty", ""}},
	}
}

func TestInputsInAnyOrderAndChosenOutputs(t *testing.T) {
	s := open(t, add(-1))
	if want := map[string]string{"rxvision.labels": `["a","b"]`, "empty": ""}; !reflect.DeepEqual(s.Properties(), want) {
		t.Errorf("properties %v", s.Properties())
	}
	a := oip.FromFloat32("a", []int64{2}, []float32{1, 2})
	b := oip.FromFloat32("b", []int64{2}, []float32{10, 20})
	sum := oip.FromFloat32("sum", []int64{2}, []float32{11, 22})
	cp := a
	cp.Name = "copy"
	for _, tc := range []struct {
		names []string
		want  []oip.Tensor
	}{
		{nil, []oip.Tensor{sum, cp}},
		{[]string{"copy", "sum"}, []oip.Tensor{cp, sum}},
		{[]string{"copy"}, []oip.Tensor{cp}},
	} {
		got, err := s.Run(context.Background(), []oip.Tensor{b, a}, tc.names)
		if err != nil || !reflect.DeepEqual(got, tc.want) {
			t.Errorf("%v: got %+v, %v", tc.names, got, err)
		}
	}
}

func TestBadInputs(t *testing.T) {
	s := open(t, add(-1, 2))
	ok := oip.FromFloat32("b", []int64{1, 2}, []float32{1, 2})
	a := func(d oip.Datatype, size int, shape ...int64) oip.Tensor {
		return oip.Tensor{Name: "a", Datatype: d, Shape: shape, Data: make([]byte, size)}
	}
	for _, tc := range []struct {
		inputs  []oip.Tensor
		outputs []string
		want    string
	}{
		{nil, nil, `input "a" is missing: expected FP32 of shape [-1,2]; input "b" is missing: expected FP32 of shape [-1,2]`},
		{[]oip.Tensor{{Name: "x"}, ok}, nil, `unknown input "x", the model has "a", "b"; input "a" is missing: expected FP32 of shape [-1,2]`},
		{[]oip.Tensor{a(oip.FP64, 16, 1, 2), ok}, nil, `input "a": expected datatype FP32, got FP64`},
		{[]oip.Tensor{a(oip.FP32, 12, 1, 3), ok}, nil, `input "a": expected shape [-1,2], got [1,3]`},
		{[]oip.Tensor{a(oip.FP32, 8, 2), ok}, nil, `input "a": expected shape [-1,2], got [2]`},
		{[]oip.Tensor{a(oip.FP32, 7, 1, 2), ok}, nil, `input "a": FP32 of shape [1 2]: expected 2 elements of 4 bytes, got 7 bytes`},
		{[]oip.Tensor{a(oip.FP32, 8, 1, 2), ok, ok}, nil, `input "b" is given twice`},
		{[]oip.Tensor{a(oip.FP32, 8, 1, 2), ok}, []string{"z"}, `unknown output "z", the model has "sum", "copy"`},
	} {
		_, err := s.Run(context.Background(), tc.inputs, tc.outputs)
		if err == nil || err.Error() != tc.want || oip.StatusOf(err) != 400 {
			t.Errorf("got  %v\nwant %s", err, tc.want)
		}
	}
	_, err := s.Run(context.Background(), []oip.Tensor{a(oip.FP32, 16, 2, 2), oip.FromFloat32("b", []int64{3, 2}, make([]float32, 6))}, nil)
	if err == nil || !strings.HasPrefix(err.Error(), "run model: ") || strings.ContainsAny(err.Error(), "\n\x1b") {
		t.Errorf("shapes that do not go together: %v", err)
	}
}

func TestBadFiles(t *testing.T) {
	load(t)
	good := onnxtest.Identity(onnxtest.Float, []int64{1}).Bytes()
	foreign := onnxtest.Identity(onnxtest.Float, []int64{1})
	foreign.Nodes[0].Op, foreign.Nodes[0].Domain = "Sorcery", "rx"
	unknown := onnxtest.Identity(onnxtest.Float, []int64{1})
	unknown.Nodes[0].Op = "Sorcery"
	opset := onnxtest.Identity(onnxtest.Float, []int64{1})
	opset.Opset = 99
	ir := onnxtest.Identity(onnxtest.Float, []int64{1})
	ir.IR = 99
	sequence := onnxtest.Model{
		Nodes:   []onnxtest.Node{{Op: "SequenceConstruct", Inputs: []string{"x"}, Outputs: []string{"y"}}},
		Inputs:  []onnxtest.Value{{Name: "x", Elem: onnxtest.Float, Dims: []int64{1}}},
		Outputs: []onnxtest.Value{{Name: "y", Elem: onnxtest.Float, Dims: []int64{1}, Sequence: true}},
	}
	float8 := onnxtest.Identity(onnxtest.Float8, []int64{1})
	float8.Opset, float8.IR = 19, 9
	kernel := onnxtest.Model{
		Nodes:   []onnxtest.Node{{Op: "Erf", Inputs: []string{"x"}, Outputs: []string{"y"}}},
		Inputs:  []onnxtest.Value{{Name: "x", Elem: onnxtest.BFloat, Dims: []int64{1}}},
		Outputs: []onnxtest.Value{{Name: "y", Elem: onnxtest.BFloat, Dims: []int64{1}}},
	}
	wired := onnxtest.Identity(onnxtest.Float, []int64{1})
	wired.Nodes[0].Inputs = []string{"nowhere"}
	v := Version()
	for _, tc := range []struct {
		name  string
		bytes []byte
		is    error
		want  string
	}{
		{"empty", nil, ErrNotModel, `model.onnx: not an ONNX model: the file is empty`},
		{"text", []byte("hello, this is text\n"), ErrNotModel, `model.onnx: not an ONNX model: byte 2 does not begin a field of one`},
		{"png", []byte("\x89PNG\r\n\x1a\n0000000000"), ErrNotModel, `model.onnx: not an ONNX model: byte 0 does not begin a field of one`},
		{"zip", []byte("PK\x03\x04aaaaaaaaaaaaaaaaaaaaaa"), ErrNotModel, `model.onnx: not an ONNX model: byte 2 does not begin a field of one`},
		{"zeros", make([]byte, 100), ErrNotModel, `model.onnx: not an ONNX model: byte 0 does not begin a field of one`},
		{"cut in the graph", good[:40], ErrTruncated, `model.onnx: truncated ONNX model: the field at byte 17 needs 67 bytes, 21 are left`},
		{"cut in a length", good[:18], ErrTruncated, `model.onnx: truncated ONNX model: it ends inside the field at byte 17`},
		{"cut before the graph", good[:17], ErrTruncated, `model.onnx: truncated ONNX model: it has no graph`},
		{"broken graph", slices.Concat(good[:30], bytes.Repeat([]byte{0xff}, 40), good[70:]), ErrNotModel, `model.onnx: not an ONNX model: its protobuf cannot be parsed`},
		{"foreign operator", foreign.Bytes(), ErrOperator, `model.onnx: operator rx:Sorcery: ONNX Runtime has no such operator (version ` + v + `)`},
		{"unknown operator", unknown.Bytes(), ErrOperator, `model.onnx: operator Sorcery: ONNX Runtime has no such operator (version ` + v + `)`},
		{"no kernel", kernel.Bytes(), ErrOperator, `model.onnx: operator Erf of opset 13: ONNX Runtime has no such operator for these types on this device (version ` + v + `)`},
		{"opset", opset.Bytes(), ErrVersion, ""},
		{"ir", ir.Bytes(), ErrVersion, ""},
		{"sequence", sequence.Bytes(), ErrUnsupported, `model.onnx: output "y" is a sequence, which the inference protocol cannot carry: export the model with tensors only (for scikit-learn: zipmap=False)`},
		{"float8", float8.Bytes(), ErrUnsupported, `model.onnx: input "x" has element type float8e4m3fn, which the inference protocol cannot carry`},
		{"wired to nowhere", wired.Bytes(), nil, `model.onnx: Invalid model. Node input 'nowhere' is not a graph input, initializer, or output of a previous node.`},
	} {
		_, err := Open(onnxtest.WriteBytes(t, tc.bytes), Options{})
		t.Logf("%s: %v", tc.name, err)
		switch {
		case err == nil:
			t.Errorf("%s: no error", tc.name)
		case tc.is != nil && !errors.Is(err, tc.is):
			t.Errorf("%s: %v is not %v", tc.name, err, tc.is)
		case tc.want != "" && err.Error() != tc.want:
			t.Errorf("%s: got %v\nwant %s", tc.name, err, tc.want)
		case strings.ContainsAny(err.Error(), "\n\x1b") || len(err.Error()) > maxMessage+100:
			t.Errorf("%s: not one short line: %q", tc.name, err)
		}
	}
	if _, err := Open(t.TempDir(), Options{}); !errors.Is(err, ErrNotModel) {
		t.Errorf("a folder: %v", err)
	}
	if _, err := Open("/none", Options{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	logs.Lock()
	defer logs.Unlock()
	if strings.Contains(logs.String(), "\\x1b") {
		t.Errorf("colours in the log: %s", &logs.Buffer)
	}
}

func TestConcurrentRunsAgree(t *testing.T) {
	s := open(t, add(-1))
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 200 {
				n := 1 + (g*31+i)%64
				a, b, want := make([]float32, n), make([]float32, n), make([]float32, n)
				for k := range a {
					a[k], b[k] = float32(g*1000+k), float32(i)
					want[k] = a[k] + b[k]
				}
				shape := []int64{int64(n)}
				out, err := s.Run(context.Background(), []oip.Tensor{oip.FromFloat32("a", shape, a), oip.FromFloat32("b", shape, b)}, []string{"sum"})
				if err != nil || !bytes.Equal(out[0].Data, oip.FromFloat32("", shape, want).Data) {
					t.Errorf("got %+v, %v", out, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func TestRunEndsWithItsContext(t *testing.T) {
	s := open(t, onnxtest.Slow(5000)) // minutes, if nothing ended it
	x := []oip.Tensor{oip.FromFloat32("x", []int64{700, 700}, make([]float32, 700*700))}
	cause := errors.New("the caller went away")
	ctx, cancel := context.WithCancelCause(context.Background())
	done := make(chan error)
	go func() {
		_, err := s.Run(ctx, x, nil)
		done <- err
	}()
	for s.mu.TryLock() { // until the run has begun
		s.mu.Unlock()
	}
	cancel(cause)
	if err := <-done; !errors.Is(err, cause) {
		t.Errorf("got %v", err)
	}
	if _, err := s.Run(ctx, x, nil); !errors.Is(err, cause) {
		t.Errorf("a run that comes too late: %v", err)
	}
	small := []oip.Tensor{oip.FromFloat32("x", []int64{1, 1}, []float32{1})}
	if _, err := s.Run(context.Background(), small, nil); err != nil {
		t.Errorf("the next run: %v", err)
	}
}

func TestClosedSession(t *testing.T) {
	s := open(t, add(1))
	s.Close()
	s.Close()
	one := []float32{1}
	_, err := s.Run(context.Background(), []oip.Tensor{oip.FromFloat32("a", []int64{1}, one), oip.FromFloat32("b", []int64{1}, one)}, nil)
	if err == nil || err.Error() != "run model: the session is closed" {
		t.Error(err)
	}
}

func FuzzInspect(f *testing.F) {
	f.Add(onnxtest.Identity(onnxtest.Float, []int64{1}).Bytes())
	f.Add([]byte{8, 1, 58, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		err := walk(bytes.NewReader(b), int64(len(b)))
		if err != nil && !errors.Is(err, ErrNotModel) && !errors.Is(err, ErrTruncated) {
			t.Fatal(err)
		}
	})
}

func BenchmarkRun(b *testing.B) {
	s := open(b, add(-1))
	in := []oip.Tensor{oip.FromFloat32("a", []int64{1}, []float32{1}), oip.FromFloat32("b", []int64{1}, []float32{2})}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.Run(ctx, in, nil); err != nil {
			b.Fatal(err)
		}
	}
}
