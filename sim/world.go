package sim

import (
	"container/heap"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"time"
)

// Defaults and bounds of a run.
const (
	DefaultCommands = 4000 // applied before faults and load stop
	DefaultEvents   = 200  // kept for the report of a failure

	maxVirtual = 6 * time.Hour   // of faults and load: less means that nothing is committed any more
	maxDrain   = time.Hour       // virtual, until all work has drained
	settleStep = 5 * time.Second // between two looks whether it has
	maxSteps   = 200_000_000     // events of one run
)

// Config is one run. The zero value of each field draws it from the seed or
// takes its default.
type Config struct {
	Seed     uint64
	Servers  int // 3 to 5
	Nodes    int // 1 to 200
	Commands int // applied before faults and load stop
	Events   int // kept for the report of a failure
}

// Report is what a run did.
type Report struct {
	Seed     uint64
	Steps    uint64 // events
	Commands int    // different commands that were committed, applied and checked
	Applied  int    // by all servers together, replays after restarts included
	Virtual  time.Duration
	Trace    uint64 // hash over all that happened: equal for equal seeds
	Coverage Coverage
}

// Failure is a broken invariant.
type Failure struct {
	Seed   uint64
	Step   uint64
	Time   time.Duration // virtual, since the begin
	Cause  error
	Events []string // the last ones
}

// Error implements error: what broke, when, and how to see it again.
func (f *Failure) Error() string {
	return fmt.Sprintf("seed %d, step %d, virtual time %s: %v", f.Seed, f.Step, f.Time, f.Cause)
}

// Unwrap gives the cause.
func (f *Failure) Unwrap() error { return f.Cause }

// Run runs one seed to its end; the error is a *Failure, or says what is wrong with cfg.
func Run(cfg Config) (report *Report, err error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	w := newWorld(cfg)
	defer func() {
		if p := recover(); p != nil { // a broken invariant in the rules or in placement
			err = w.failed(fmt.Errorf("panic: %v\n%s", p, debug.Stack()))
		}
	}()
	err = w.live()
	return w.report(), err
}

func (c *Config) validate() error {
	var errs []error
	bounded := func(name string, v, low, high int) {
		if v != 0 && (v < low || v > high) {
			errs = append(errs, fmt.Errorf("%s is %d; it must be %d to %d", name, v, low, high))
		}
	}
	bounded("Servers", c.Servers, 3, 5)
	bounded("Nodes", c.Nodes, 1, 200)
	bounded("Commands", c.Commands, 1, 1_000_000)
	bounded("Events", c.Events, 1, 1_000_000)
	return errors.Join(errs...)
}

// event is something that happens at a virtual time.
type event struct {
	at  int64
	seq uint64
	do  func()
}

type events []event

func (e events) Len() int { return len(e) }
func (e events) Less(i, j int) bool {
	return e[i].at < e[j].at || (e[i].at == e[j].at && e[i].seq < e[j].seq)
}
func (e events) Swap(i, j int) { e[i], e[j] = e[j], e[i] }
func (e *events) Push(x any)   { *e = append(*e, x.(event)) }
func (e *events) Pop() any {
	last := len(*e) - 1
	x := (*e)[last]
	(*e)[last] = event{}
	*e = (*e)[:last]
	return x
}

// epoch is the virtual begin of every run, in unix nanoseconds.
const epoch = int64(1_700_000_000 * time.Second)

// world is one run.
type world struct {
	cfg   Config
	rnd   *rand.Rand
	now   int64
	queue events
	seq   uint64
	step  uint64

	net     *network
	servers []*server
	nodes   []*node
	users   []*user
	truth   *truth
	faults  *faults
	weather weather
	calm    bool // faults and load have stopped
	cause   error

	lines    []string // ring of the last events
	lineAt   int
	hash     uint64
	coverage Coverage
	applied  int
}

func newWorld(cfg Config) *world {
	w := &world{cfg: cfg, rnd: rand.New(rand.NewPCG(cfg.Seed, 0x5eed)), now: epoch, hash: fnvOffset, coverage: newCoverage()}
	if w.cfg.Servers == 0 {
		w.cfg.Servers = w.oneOf(3, 3, 4, 5)
	}
	if w.cfg.Nodes == 0 {
		w.cfg.Nodes = 4 + w.rnd.IntN(21)
	}
	if w.cfg.Commands == 0 {
		w.cfg.Commands = DefaultCommands
	}
	if w.cfg.Events == 0 {
		w.cfg.Events = DefaultEvents
	}
	w.lines = make([]string, 0, w.cfg.Events)
	w.weather = drawWeather(w)
	w.net = newNetwork(w)
	w.truth = newTruth(w)
	for i := range w.cfg.Servers {
		w.servers = append(w.servers, newServer(w, i))
	}
	for i := range w.cfg.Nodes {
		w.nodes = append(w.nodes, newNode(w, i))
	}
	for i := range 1 + w.rnd.IntN(4) {
		w.users = append(w.users, newUser(w, i))
	}
	w.faults = newFaults(w)
	return w
}

// live is the whole story: faults and load, then calm, then the last checks.
func (w *world) live() error {
	for _, s := range w.servers {
		s.boot()
	}
	for _, n := range w.nodes {
		w.after(w.upTo(2*time.Second), n.startAgent)
	}
	for _, u := range w.users {
		w.after(w.upTo(time.Second), u.act)
	}
	w.faults.begin()
	start := w.now
	for w.truth.commands < w.cfg.Commands && w.cause == nil {
		w.next()
		if time.Duration(w.now-start) > maxVirtual {
			return w.failed(fmt.Errorf("only %d of %d commands were committed in %s of virtual time", w.truth.commands, w.cfg.Commands, maxVirtual))
		}
	}
	w.becalm()
	deadline := w.now + int64(maxDrain)
	for w.cause == nil {
		for until := w.now + int64(settleStep); w.now < until && w.cause == nil; {
			w.next()
		}
		undrained := w.drained()
		if undrained == nil {
			break
		}
		if w.now > deadline {
			return w.failed(fmt.Errorf("work has not drained %s after the last fault: %w", maxDrain, undrained))
		}
	}
	if w.cause == nil {
		w.fail(w.lastChecks())
	}
	if w.cause != nil {
		return w.failed(w.cause)
	}
	return nil
}

// next lets one event happen.
func (w *world) next() {
	if w.step++; w.step > maxSteps {
		panic("the run does not end")
	}
	e := heap.Pop(&w.queue).(event)
	w.now = e.at
	e.do()
}

// after lets something happen later.
func (w *world) after(d time.Duration, do func()) {
	w.seq++
	heap.Push(&w.queue, event{w.now + max(int64(d), 0), w.seq, do})
}

// fail ends the run with the first broken invariant; nil does nothing.
func (w *world) fail(err error) {
	if err != nil && w.cause == nil {
		w.cause = err
	}
}

func (w *world) failf(format string, args ...any) { w.fail(fmt.Errorf(format, args...)) }

func (w *world) failed(cause error) *Failure {
	lines := append(append([]string{}, w.lines[w.lineAt:]...), w.lines[:w.lineAt]...)
	return &Failure{Seed: w.cfg.Seed, Step: w.step, Time: time.Duration(w.now - epoch), Cause: cause, Events: lines}
}

func (w *world) report() *Report {
	return &Report{
		Seed: w.cfg.Seed, Steps: w.step, Commands: w.truth.commands, Applied: w.applied,
		Virtual: time.Duration(w.now - epoch), Trace: w.hash, Coverage: w.coverage,
	}
}

const (
	fnvOffset = 14695981039346656037
	fnvPrime  = 1099511628211
)

// note adds a line to the history and its hash.
func (w *world) note(format string, args ...any) {
	line := fmt.Sprintf("%12.6f #%d ", time.Duration(w.now-epoch).Seconds(), w.step) + fmt.Sprintf(format, args...)
	for i := range len(line) {
		w.hash = (w.hash ^ uint64(line[i])) * fnvPrime
	}
	if len(w.lines) < cap(w.lines) {
		w.lines = append(w.lines, line)
		return
	}
	w.lines[w.lineAt] = line
	w.lineAt = (w.lineAt + 1) % len(w.lines)
}

// chance is true with a probability in thousandths.
func (w *world) chance(thousandths int) bool { return w.rnd.IntN(1000) < thousandths }

// upTo draws a duration in [0, d).
func (w *world) upTo(d time.Duration) time.Duration {
	if d <= 0 {
		return 0
	}
	return time.Duration(w.rnd.Int64N(int64(d)))
}

// between draws a duration in [low, high).
func (w *world) between(low, high time.Duration) time.Duration { return low + w.upTo(high-low) }

func (w *world) oneOf(vs ...int) int { return vs[w.rnd.IntN(len(vs))] }

func pick[T any](w *world, s []T) T { return s[w.rnd.IntN(len(s))] }

// newID draws a UUID.
func (w *world) newID() string {
	var b [16]byte
	for i := range 2 {
		v := w.rnd.Uint64()
		for j := range 8 {
			b[8*i+j] = byte(v >> (8 * j))
		}
	}
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	h := hex.EncodeToString(b[:])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}
