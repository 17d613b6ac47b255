package e2e

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// TestKillAnything kills processes of dev at random moments, the supervisor
// included, while jobs are registered. Whatever was acknowledged is there after
// the restart, and the model answers again. RXVISION_TEST_SEED repeats a run's
// choices.
func TestKillAnything(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if v := os.Getenv("RXVISION_TEST_SEED"); v != "" {
		if _, err := fmt.Sscan(v, &seed); err != nil {
			t.Fatal(err)
		}
	}
	rounds := 6
	if os.Getenv("RXVISION_TEST_LONG") != "" {
		rounds = 60
	}
	t.Logf("RXVISION_TEST_SEED=%d", seed)
	fmt.Printf("MEASURED kill-anything seed %d\n", seed)
	rng := rand.New(rand.NewPCG(seed, 2))

	p := newPlatform(t)
	p.start()
	p.serveFashion()

	// A client registers jobs one after another and notes what was acknowledged.
	var (
		mu    sync.Mutex
		acked []string
		stop  = make(chan struct{})
		done  = make(chan struct{})
	)
	go func() {
		defer close(done)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			id := fmt.Sprintf("acked-%d", i)
			body := fmt.Sprintf(`{"Job":{"ID":%q,"Type":"batch","TaskGroups":[{"Name":"g","Count":0,"Tasks":[{"Name":"t","Driver":"raw_exec","Config":{"command":"/bin/true"}}]}]}}`, id)
			code, _, err := send("PUT", p.http()+"/v1/jobs", nil, strings.NewReader(body))
			if err == nil && code == 200 {
				mu.Lock()
				acked = append(acked, id)
				mu.Unlock()
			} else {
				time.Sleep(10 * time.Millisecond)
			}
		}
	}()

	for round := range rounds {
		time.Sleep(time.Duration(rng.IntN(700)) * time.Millisecond) // the random moment
		if rng.IntN(3) == 0 {
			t.Logf("round %d: kill -9 the supervisor", round)
			p.kill()
			p.start()
			continue
		}
		procs := p.processes()
		pids := make([]int, 0, len(procs))
		for pid := range procs {
			pids = append(pids, pid)
		}
		if len(pids) == 0 {
			continue
		}
		slices.Sort(pids)
		pid := pids[rng.IntN(len(pids))]
		t.Logf("round %d: kill -9 %d: %.160s", round, pid, procs[pid])
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && err != syscall.ESRCH {
			t.Fatal(err)
		}
	}
	close(stop)
	<-done
	mu.Lock()
	want := slices.Clone(acked)
	mu.Unlock()
	if len(want) == 0 {
		t.Fatal("nothing was acknowledged during the run")
	}
	p.await("the server answers again", func() bool {
		code, _, err := send("GET", p.http()+"/v1/jobs", nil, nil)
		return err == nil && code == 200
	})
	var jobs []struct{ ID string }
	p.get("/v1/jobs", &jobs)
	have := map[string]bool{}
	for _, j := range jobs {
		have[j.ID] = true
	}
	for _, id := range append(want, "fashion") {
		if !have[id] {
			t.Errorf("job %s was acknowledged and is gone", id)
		}
	}
	t.Logf("%d registrations acknowledged, all there", len(want))
	p.await("the model answers again", func() bool {
		return p.command(binary, "infer", "fashion", filepath.Join(root, "testdata/fashion/0000-9.png")).code == 0
	})
}

// TestAgentDeathKeepsServing kills the agent while requests flow: no request
// fails, and the next agent takes the same worker over.
func TestAgentDeathKeepsServing(t *testing.T) {
	p := newPlatform(t)
	p.start()
	p.serveFashion()
	worker := p.find("worker", "-model")
	load := startLoad(t, p, 4)
	agent := p.find("agent", "--data-dir")
	for _, pid := range agent {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	p.await("the next agent is attached", func() bool {
		now := p.find("agent", "--data-dir")
		if len(now) == 0 || slices.Equal(now, agent) {
			return false
		}
		code, text, err := send("GET", "http://"+p.addrs["agent-http-addr"]+"/health", nil, nil)
		return err == nil && code == 200 && strings.Contains(text, `"ok"`)
	})
	load.end(t)
	if now := p.find("worker", "-model"); !slices.Equal(now, worker) {
		t.Errorf("workers were %v and are %v after the agent's death", worker, now)
	}
}

// TestRollingUpdateLosesNothing rolls the serving job twice, up and down in
// count, under load: every request is answered.
func TestRollingUpdateLosesNothing(t *testing.T) {
	p := newPlatform(t)
	p.start()
	p.serveFashion()
	src, err := os.ReadFile(filepath.Join(root, "jobs/examples/fashion.nomad.hcl"))
	if err != nil {
		t.Fatal(err)
	}
	load := startLoad(t, p, 4)
	for i, change := range []string{"count = 2", "count = 2\n    meta { v = \"2\" }", "count = 1\n    meta { v = \"2\" }"} {
		t.Logf("change %d: %q", i, change)
		p.rxvision(0, "job", "run", write(t, "fashion.nomad.hcl", strings.Replace(string(src), "count = 1", change, 1)))
	}
	load.end(t)
}

// TestWorkerCrashIsTold kills the worker: it is started again with a pause, and
// the allocation says why it ended.
func TestWorkerCrashIsTold(t *testing.T) {
	p := newPlatform(t)
	p.start()
	p.serveFashion()
	before := p.find("worker", "-model")
	var allocs []struct{ ID string }
	p.get("/v1/job/fashion/allocations", &allocs)
	for _, pid := range before {
		if err := syscall.Kill(pid, syscall.SIGSEGV); err != nil {
			t.Fatal(err)
		}
	}
	p.await("a new worker serves", func() bool {
		now := p.find("worker", "-model")
		return len(now) > 0 && !slices.Equal(now, before) &&
			p.command(binary, "infer", "fashion", filepath.Join(root, "testdata/fashion/0000-9.png")).code == 0
	})
	p.nomad(0, "alloc", "status", allocs[0].ID).has(t, "Terminated", "Restarting")
	p.nomad(0, "alloc", "status", allocs[0].ID).matches(t, `(?i)signal.*(11|segmentation)|Exit Code: \d+`)
}

// find gives the pids of this platform's processes whose command line has all
// words, supervisors of tasks left out.
func (p *platform) find(words ...string) []int {
	var out []int
	for pid, line := range p.processes() {
		if strings.Contains(line, "__rx") || strings.Contains(line, "shim") {
			continue
		}
		if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, " "+w+" ") }) {
			out = append(out, pid)
		}
	}
	slices.Sort(out)
	return out
}

// load asks the gateway to classify without pause and counts what fails.
type load struct {
	stop   chan struct{}
	wg     sync.WaitGroup
	asked  atomic.Int64
	mu     sync.Mutex
	faults []string
}

func startLoad(t *testing.T, p *platform, clients int) *load {
	image, err := os.ReadFile(filepath.Join(root, "testdata/fashion/0000-9.png"))
	if err != nil {
		t.Fatal(err)
	}
	l := &load{stop: make(chan struct{})}
	for range clients {
		l.wg.Go(func() {
			for {
				select {
				case <-l.stop:
					return
				default:
				}
				resp, err := http.Post(p.gateway()+"/v1/models/fashion/classify", "", strings.NewReader(string(image)))
				if err == nil {
					var b []byte
					b, err = io.ReadAll(resp.Body)
					resp.Body.Close()
					if err == nil && resp.StatusCode != 200 {
						err = fmt.Errorf("%s: %s", resp.Status, b)
					}
				}
				l.asked.Add(1)
				if err != nil {
					l.mu.Lock()
					l.faults = append(l.faults, err.Error())
					l.mu.Unlock()
				}
				time.Sleep(2 * time.Millisecond) // leave the machine to those who change things
			}
		})
	}
	p.await("the load has begun", func() bool { return l.asked.Load() > 20 })
	return l
}

func (l *load) end(t *testing.T) {
	t.Helper()
	close(l.stop)
	l.wg.Wait()
	t.Logf("%d requests, %d failed", l.asked.Load(), len(l.faults))
	if len(l.faults) > 0 {
		t.Errorf("%d of %d requests failed, the first: %s", len(l.faults), l.asked.Load(), l.faults[0])
	}
}
