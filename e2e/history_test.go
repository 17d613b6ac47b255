package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

// The load of the fault suite: API clients that compare and set job indexes,
// read them, and register jobs that must never be lost. What they saw is checked
// for linearizability afterwards.

// casInput is what a client asked: to read a job, or to set it if it is at an index.
type casInput struct {
	job   string
	write bool
	index uint64 // expected; 0: the job is not there
	value string // written
}

// casOutput is what it was told.
type casOutput struct {
	unknown bool // of a write: no answer, or one that says nothing
	refused bool // of a write: the index was another
	index   uint64
	value   string // read
}

// register is a job as the model sees it. index 0 beside a value: not known, since
// the one who wrote it got no answer.
type register struct {
	value string
	index uint64
}

// registers is the model: each job is a register of its own.
var registers = (&porcupine.NondeterministicModel{
	Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
		byJob := map[string][]porcupine.Operation{}
		var order []string
		for _, op := range history {
			job := op.Input.(casInput).job
			if byJob[job] == nil {
				order = append(order, job)
			}
			byJob[job] = append(byJob[job], op)
		}
		var out [][]porcupine.Operation
		for _, job := range order {
			out = append(out, byJob[job])
		}
		return out
	},
	Init: func() []any { return []any{register{}} },
	Step: func(state, input, output any) []any {
		s, in, out := state.(register), input.(casInput), output.(casOutput)
		missing := s == register{}
		fits := in.index == s.index && (s.index != 0 || missing)
		switch {
		case !in.write:
			if s.value != out.value || s.index != 0 && s.index != out.index {
				return nil
			}
			return []any{register{out.value, out.index}}
		case out.unknown:
			if fits {
				return []any{s, register{in.value, 0}}
			}
			return []any{s}
		case out.refused:
			if fits {
				return nil
			}
			return []any{s}
		case !fits || out.index <= s.index:
			return nil
		default:
			return []any{register{in.value, out.index}}
		}
	},
	Equal: func(a, b any) bool { return a == b },
	DescribeOperation: func(input, output any) string {
		return fmt.Sprintf("%+v → %+v", input, output)
	},
}).ToModel()

// apiLoad runs clients against all servers of a region until stop.
type apiLoad struct {
	r      *region
	cancel context.CancelFunc
	wg     sync.WaitGroup
	began  time.Time

	mu    sync.Mutex
	ops   []porcupine.Operation
	acked map[string]uint64 // unique jobs that were accepted: ID → JobModifyIndex
	// counts of what happened
	reads, writes, refusals, unknowns, tries atomic.Int64
}

const (
	// maxOps bounds a history: checking it takes time and memory.
	maxOps = 500_000
	// jobLife is how long clients stay with a job: a short history of many that
	// nobody answered can be checked, a long one cannot.
	jobLife = 30 * time.Second
	// checkFor bounds the check.
	checkFor = 5 * time.Minute
)

func startAPILoad(r *region, seed uint64, casClients, writers int) *apiLoad {
	ctx, cancel := context.WithCancel(context.Background())
	l := &apiLoad{r: r, cancel: cancel, began: time.Now(), acked: map[string]uint64{}}
	for i := range casClients {
		l.wg.Go(func() { l.compareAndSet(ctx, i, rand.New(rand.NewPCG(seed, uint64(i)))) })
	}
	for i := range writers {
		l.wg.Go(func() { l.registerUnique(ctx, i, rand.New(rand.NewPCG(seed, 1000+uint64(i)))) })
	}
	return l
}

// stop ends the clients and waits for their last answers.
func (l *apiLoad) stop() {
	l.cancel()
	l.wg.Wait()
}

func (l *apiLoad) full() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.ops) >= maxOps
}

func (l *apiLoad) record(client int, in casInput, out casOutput, call, ret time.Time) {
	op := porcupine.Operation{ClientId: client, Input: in, Output: out, Call: call.Sub(l.began).Nanoseconds(), Return: ret.Sub(l.began).Nanoseconds()}
	if out.unknown {
		op.Return = int64(1) << 62 // it may take effect at any time from now on
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.ops) < maxOps {
		l.ops = append(l.ops, op)
	}
}

// loadJob is a job that places nothing.
func loadJob(id, value string) map[string]any {
	return map[string]any{
		"ID": id, "Name": id, "Type": "service", "Datacenters": []string{"dc1"}, "Meta": map[string]string{"value": value},
		"TaskGroups": []any{map[string]any{
			"Name": "g", "Count": 0,
			"Tasks": []any{map[string]any{"Name": "t", "Driver": "raw_exec", "Config": map[string]any{"command": "/bin/true"}}},
		}},
	}
}

// compareAndSet reads a job and writes it at the index it saw, now and then at an
// old one.
func (l *apiLoad) compareAndSet(ctx context.Context, client int, rng *rand.Rand) {
	next := 0
	for ctx.Err() == nil && !l.full() {
		job := fmt.Sprintf("cas-%d-%d", client/2, time.Since(l.began)/jobLife) // two clients meet at each
		server := rng.IntN(len(l.r.servers))
		seen, ok := l.read(client, server, job)
		if !ok {
			pause(ctx, 20*time.Millisecond)
			continue
		}
		expect := seen
		if rng.IntN(10) == 0 && expect > 0 {
			expect-- // never right
		}
		next++
		l.write(client, rng.IntN(len(l.r.servers)), job, expect, fmt.Sprintf("%d.%d", client, next))
		pause(ctx, time.Duration(rng.IntN(20))*time.Millisecond)
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

func (l *apiLoad) read(client, server int, job string) (index uint64, ok bool) {
	call := time.Now()
	l.tries.Add(1)
	status, body, err := l.r.call(http.MethodGet, server, "/v1/job/"+job+"?consistent", nil)
	ret := time.Now()
	var got struct {
		JobModifyIndex uint64
		Meta           map[string]string
	}
	switch {
	case err == nil && status == http.StatusNotFound && strings.Contains(string(body), "job not found"):
	case err == nil && status == http.StatusOK && json.Unmarshal(body, &got) == nil:
	default:
		return 0, false // a read without an answer says nothing
	}
	l.reads.Add(1)
	l.record(client, casInput{job: job}, casOutput{index: got.JobModifyIndex, value: got.Meta["value"]}, call, ret)
	return got.JobModifyIndex, true
}

func (l *apiLoad) write(client, server int, job string, expect uint64, value string) {
	in := casInput{job: job, write: true, index: expect, value: value}
	call := time.Now()
	l.tries.Add(1)
	status, body, err := l.r.call(http.MethodPut, server, "/v1/jobs", map[string]any{
		"Job": loadJob(job, value), "EnforceIndex": true, "JobModifyIndex": expect,
	})
	ret := time.Now()
	var got struct{ JobModifyIndex uint64 }
	var out casOutput
	switch {
	case err == nil && status == http.StatusOK && json.Unmarshal(body, &got) == nil:
		out.index = got.JobModifyIndex
		l.writes.Add(1)
	case err == nil && strings.Contains(string(body), "Enforcing job modify index"):
		out.refused = true
		l.refusals.Add(1)
	default:
		out.unknown = true
		l.unknowns.Add(1)
	}
	l.record(client, in, out, call, ret)
}

// registerUnique registers one new job after the other and remembers which were accepted.
func (l *apiLoad) registerUnique(ctx context.Context, client int, rng *rand.Rand) {
	for n := 0; ctx.Err() == nil; n++ {
		id := fmt.Sprintf("keep-%d-%d", client, n)
		l.tries.Add(1)
		status, body, err := l.r.call(http.MethodPut, rng.IntN(len(l.r.servers)), "/v1/jobs", map[string]any{"Job": loadJob(id, id)})
		var got struct{ JobModifyIndex uint64 }
		if err == nil && status == http.StatusOK && json.Unmarshal(body, &got) == nil {
			l.writes.Add(1)
			l.mu.Lock()
			l.acked[id] = got.JobModifyIndex
			l.mu.Unlock()
			pause(ctx, 10*time.Millisecond)
			continue
		}
		l.unknowns.Add(1)
		pause(ctx, 50*time.Millisecond)
	}
}

// check says whether the history is linearizable and every accepted job is at
// every server that runs.
func (l *apiLoad) check(t testing.TB) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	switch res, _ := porcupine.CheckOperationsVerbose(registers, l.ops, checkFor); res {
	case porcupine.Illegal:
		t.Errorf("the history of %d operations on job indexes is not linearizable", len(l.ops))
	case porcupine.Unknown:
		t.Errorf("whether %d operations are linearizable could not be decided within %s", len(l.ops), checkFor)
	}
	for i, s := range l.r.servers {
		if !s.running() {
			continue
		}
		var jobs []struct {
			ID             string
			JobModifyIndex uint64
		}
		l.r.await(s.name+" lists its jobs", func() bool { return l.r.get(i, "/v1/jobs?stale&prefix=keep-", &jobs) })
		has := map[string]uint64{}
		for _, j := range jobs {
			has[j.ID] = j.JobModifyIndex
		}
		lost := 0
		for id, index := range l.acked {
			if has[id] != index {
				lost++
				if lost <= 5 {
					t.Errorf("job %s was accepted at index %d; %s has it at %d (0: not at all)", id, index, s.name, has[id])
				}
			}
		}
		if lost > 0 {
			t.Errorf("%s: %d of %d accepted jobs are lost or changed", s.name, lost, len(l.acked))
		}
	}
}

func (l *apiLoad) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return fmt.Sprintf("%d requests: %d reads, %d writes accepted, %d refused, %d without a clear answer; %d operations in the history",
		l.tries.Load(), l.reads.Load(), l.writes.Load(), l.refusals.Load(), l.unknowns.Load(), len(l.ops))
}

// TestModelOfRegisters makes sure that the checker can say no.
func TestModelOfRegisters(t *testing.T) {
	op := func(client int, in casInput, out casOutput, call, ret int64) porcupine.Operation {
		return porcupine.Operation{ClientId: client, Input: in, Output: out, Call: call, Return: ret}
	}
	const never = int64(1) << 62
	write := func(index uint64, value string) casInput {
		return casInput{job: "j", write: true, index: index, value: value}
	}
	read := casInput{job: "j"}
	for name, c := range map[string]struct {
		ops  []porcupine.Operation
		want bool
	}{
		"in order": {[]porcupine.Operation{
			op(0, write(0, "a"), casOutput{index: 5}, 0, 10), op(1, read, casOutput{index: 5, value: "a"}, 11, 12),
			op(0, write(5, "b"), casOutput{index: 9}, 20, 30),
		}, true},
		"stale read": {[]porcupine.Operation{
			op(0, write(0, "a"), casOutput{index: 5}, 0, 10), op(1, read, casOutput{}, 11, 12),
		}, false},
		"two winners": {[]porcupine.Operation{
			op(0, write(0, "a"), casOutput{index: 5}, 0, 10),
			op(0, write(5, "b"), casOutput{index: 6}, 20, 30), op(1, write(5, "c"), casOutput{index: 7}, 21, 31),
		}, false},
		"refused though it fits": {[]porcupine.Operation{op(0, write(0, "a"), casOutput{refused: true}, 0, 10)}, false},
		"no answer, took effect": {[]porcupine.Operation{
			op(0, write(0, "a"), casOutput{unknown: true}, 0, never), op(1, read, casOutput{index: 4, value: "a"}, 50, 60),
			op(1, write(4, "b"), casOutput{index: 8}, 70, 80),
		}, true},
		"no answer, applied twice": {[]porcupine.Operation{
			op(0, write(0, "a"), casOutput{unknown: true}, 0, never), op(1, read, casOutput{index: 4, value: "a"}, 50, 60),
			op(1, read, casOutput{index: 6, value: "a"}, 70, 80),
		}, false},
	} {
		if got := porcupine.CheckOperations(registers, c.ops); got != c.want {
			t.Errorf("%s: linearizable %v, want %v", name, got, c.want)
		}
	}
}
