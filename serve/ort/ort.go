// Package ort runs ONNX models with ONNX Runtime. It is the only package that knows that library, and all of its cgo.
//
// It binds the C API itself, in ort.c, rather than through a general Go binding, because serving needs what those leave
// out: scalars, outputs of FP16 and BF16 whose shape is known only after the run, strings with any bytes, a choice of
// outputs per run, its log in ours, and any release since 1.17, so that a user can point to a library of their own.
//
// The library is loaded once per process, by Load, with its telemetry switched off before its code runs. ONNX Runtime never
// gives memory back to the system; who wants that ends the process.
package ort

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/rxvision/rxvision/oip"
)

// MaxThreads bounds Options.Threads.
const MaxThreads = 1024

// logTo is where ONNX Runtime's log goes.
var logTo atomic.Pointer[slog.Logger]

var library struct {
	sync.Mutex
	path, version string
}

// Load loads the library at the given path, for the whole life of the process. Its warnings and errors go to log from then on.
// Loading the same path again changes only the log; another path is an error. Load must have succeeded before Open.
func Load(path string, log *slog.Logger) error {
	library.Lock()
	defer library.Unlock()
	abs, err := filepath.Abs(path)
	if path == "" || err != nil {
		return fmt.Errorf("load ONNX Runtime: no path of the library is given")
	}
	if library.path == abs {
		logTo.Store(log)
		return nil
	}
	if library.path != "" {
		return fmt.Errorf("load ONNX Runtime from %s: this process has loaded it from %s", abs, library.path)
	}
	if _, err := os.Stat(abs); err != nil {
		return fmt.Errorf("load ONNX Runtime: %w", err)
	}
	logTo.Store(log)
	version, err := loadNative(abs)
	if err != nil {
		return fmt.Errorf("load ONNX Runtime from %s: %s", abs, oneLine(err.Error()))
	}
	library.path, library.version = abs, version
	return nil
}

// Version is the version of the library that was loaded, for example 1.30.0, or empty.
func Version() string {
	library.Lock()
	defer library.Unlock()
	return library.version
}

// Options are the choices of a session.
type Options struct {
	// Threads of one run, 1 when 0. Many runs at once with one thread each use a CPU better than the opposite.
	Threads int
}

// port is an input or output as ONNX Runtime describes it.
type port struct {
	name    string
	kind    int // ONNXType
	element int // ONNXTensorElementDataType
	rank    int // -1: any
	shape   []int64
}

// datatypes gives the protocol's name of an ONNXTensorElementDataType.
var datatypes = map[int]oip.Datatype{
	1: oip.FP32, 2: oip.UINT8, 3: oip.INT8, 4: oip.UINT16, 5: oip.INT16, 6: oip.INT32, 7: oip.INT64, 8: oip.BYTES,
	9: oip.BOOL, 10: oip.FP16, 11: oip.FP64, 12: oip.UINT32, 13: oip.UINT64, 16: oip.BF16,
}

// elementNames are ONNX's names of those that the protocol cannot name.
var elementNames = map[int]string{
	14: "complex64", 15: "complex128", 17: "float8e4m3fn", 18: "float8e4m3fnuz", 19: "float8e5m2", 20: "float8e5m2fnuz",
	21: "uint4", 22: "int4", 23: "float4e2m1", 24: "uint2", 25: "int2",
}

// kindNames are the ONNXTypes that are no tensors.
var kindNames = map[int]string{
	0: "an unknown kind of value", 2: "a sequence", 3: "a map", 4: "an opaque value", 5: "a sparse tensor",
	6: "an optional value",
}

// Session is an opened model. Its methods may be called from several goroutines.
type Session struct {
	inputs, outputs []oip.TensorMetadata
	anyRank         map[string]bool // inputs whose rank the model does not say
	elements        []int           // per input, ONNXTensorElementDataType
	properties      map[string]string

	mu     sync.RWMutex // held for reading during a run
	native *native      // nil once closed
}

// Open opens a model file. Faults of the file are one of this package's sentinels, wrapped in one sentence.
func Open(path string, o Options) (*Session, error) {
	if Version() == "" {
		return nil, fmt.Errorf("open model: ONNX Runtime is not loaded")
	}
	if o.Threads == 0 {
		o.Threads = 1
	}
	if o.Threads < 0 || o.Threads > MaxThreads {
		return nil, fmt.Errorf("open model: expected 1 to %d threads, got %d", MaxThreads, o.Threads)
	}
	base := filepath.Base(path)
	if err := Inspect(path); err != nil {
		return nil, err
	}
	n, inputs, outputs, properties, err := openNative(path, o.Threads)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", base, loadError(err))
	}
	s := &Session{native: n, properties: properties, anyRank: map[string]bool{}}
	if s.inputs, err = describe("input", inputs); err == nil {
		s.outputs, err = describe("output", outputs)
	}
	if err != nil {
		n.close()
		return nil, fmt.Errorf("%s: %w", base, err)
	}
	for _, p := range inputs {
		s.elements = append(s.elements, p.element)
		s.anyRank[p.name] = p.rank < 0
	}
	return s, nil
}

// describe translates ports, and refuses those that the protocol cannot carry.
func describe(kind string, ports []port) ([]oip.TensorMetadata, error) {
	out := make([]oip.TensorMetadata, 0, len(ports))
	for _, p := range ports {
		if what, other := kindNames[p.kind]; other {
			return nil, fmt.Errorf("%s %q is %s, %w: export the model with tensors only (for scikit-learn: zipmap=False)",
				kind, p.name, what, ErrUnsupported)
		}
		d, ok := datatypes[p.element]
		if !ok {
			name := elementNames[p.element]
			if name == "" {
				name = fmt.Sprintf("number %d", p.element)
			}
			return nil, fmt.Errorf("%s %q has element type %s, %w", kind, p.name, name, ErrUnsupported)
		}
		if p.rank > oip.MaxRank {
			return nil, fmt.Errorf("%s %q has %d dimensions, %w", kind, p.name, p.rank, ErrUnsupported)
		}
		shape := make([]int64, len(p.shape))
		for i, n := range p.shape {
			shape[i] = max(n, -1)
		}
		out = append(out, oip.TensorMetadata{Name: p.name, Datatype: d, Shape: shape})
	}
	return out, nil
}

// Inputs describes the model's inputs, in its order; -1 is a dimension that may vary. Not to be changed.
func (s *Session) Inputs() []oip.TensorMetadata { return s.inputs }

// Outputs describes the model's outputs, in its order. Not to be changed.
func (s *Session) Outputs() []oip.TensorMetadata { return s.outputs }

// Properties are the custom metadata of the model file. Not to be changed.
func (s *Session) Properties() map[string]string { return s.properties }

// Close waits for runs to end and releases the session; runs that start later are errors.
func (s *Session) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.native != nil {
		s.native.close()
		s.native = nil
	}
}

// Run runs the model on inputs, given in any order, and returns the named outputs in the order of their names, or all
// when there are none. The inputs' data must not change during the call; the outputs' data is the caller's. Inputs that
// do not fit the model are an *oip.Error with status 400 that names every fault. When ctx ends first, the run ends within
// about a millisecond and ctx's cause is returned.
func (s *Session) Run(ctx context.Context, inputs []oip.Tensor, outputs []string) ([]oip.Tensor, error) {
	ordered, wanted, err := s.bind(inputs, outputs)
	if err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.native == nil {
		return nil, fmt.Errorf("run model: the session is closed")
	}
	out, err := s.native.run(ctx, ordered, s.elements, wanted)
	if err != nil {
		return nil, runError(err)
	}
	return out, nil
}

// bind puts inputs into the model's order and outputs into positions, and checks everything that can be checked before
// the run.
func (s *Session) bind(inputs []oip.Tensor, outputs []string) (ordered []oip.Tensor, wanted []int, err error) {
	var faults []string
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	ordered = make([]oip.Tensor, len(s.inputs))
	given := make([]bool, len(s.inputs))
	for i := range inputs {
		t := &inputs[i]
		at := slices.IndexFunc(s.inputs, func(m oip.TensorMetadata) bool { return m.Name == t.Name })
		switch {
		case at < 0:
			fault("unknown input %q, the model has %s", t.Name, names(s.inputs))
			continue
		case given[at]:
			fault("input %q is given twice", t.Name)
			continue
		}
		given[at], ordered[at] = true, *t
		switch want := s.inputs[at]; {
		case t.Datatype != want.Datatype:
			fault("input %q: expected datatype %s, got %s", t.Name, want.Datatype, t.Datatype)
		case !s.anyRank[t.Name] && !fits(t.Shape, want.Shape):
			fault("input %q: expected shape %s, got %s", t.Name, shapeText(want.Shape), shapeText(t.Shape))
		default:
			if err := t.Check(); err != nil {
				fault("input %q: %s", t.Name, err)
			}
		}
	}
	for i, m := range s.inputs {
		if !given[i] {
			fault("input %q is missing: expected %s of shape %s", m.Name, m.Datatype, shapeText(m.Shape))
		}
	}
	for _, name := range outputs {
		at := slices.IndexFunc(s.outputs, func(m oip.TensorMetadata) bool { return m.Name == name })
		if at < 0 {
			fault("unknown output %q, the model has %s", name, names(s.outputs))
			continue
		}
		wanted = append(wanted, at)
	}
	if len(outputs) == 0 {
		for i := range s.outputs {
			wanted = append(wanted, i)
		}
	}
	if len(faults) > 0 {
		return nil, nil, oip.Errorf(http.StatusBadRequest, "%s", strings.Join(faults, "; "))
	}
	return ordered, wanted, nil
}

func fits(shape, want []int64) bool {
	return slices.EqualFunc(shape, want, func(a, b int64) bool { return b < 0 || a == b })
}

func shapeText(shape []int64) string {
	return strings.ReplaceAll(fmt.Sprint(shape), " ", ",")
}

func names(ports []oip.TensorMetadata) string {
	quoted := make([]string, len(ports))
	for i, p := range ports {
		quoted[i] = fmt.Sprintf("%q", p.Name)
	}
	return strings.Join(quoted, ", ")
}
