package agent

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// What checks of services have come to, as Nomad names it.
const (
	checkPending = "pending" // nothing to ask yet
	checkSuccess = "success"
	checkFailure = "failure"

	modeHealthiness = "healthiness"
	modeReadiness   = "readiness" // updates do not wait for it
)

const (
	checkIdle   = 250 * time.Millisecond // between looks for something to ask
	checkOutput = 3 << 10                // bytes of an answer that are kept
)

// checkResult is the latest answer to a check, in the shape of /v1/client/allocation/:id/checks.
type checkResult struct {
	ID, Mode, Status string
	StatusCode       int `json:",omitempty"`
	Output           string
	Timestamp        int64 // unix seconds
	Group, Task      string
	Service, Check   string

	passing  time.Time // since when it succeeds; zero while it does not
	failures int       // in a row, as far as they count for a restart
}

// checks asks what the services of an allocation are checked by. Results are soft: after a restart of the agent
// everything is asked anew.
type checks struct {
	mu      sync.Mutex
	running map[string]*checking
	results map[string]*checkResult
	wg      sync.WaitGroup
}

// checking is one check that is asked.
type checking struct {
	spec *cluster.ServiceCheck // as written
	stop context.CancelFunc
}

// syncChecks has exactly the checks of the job's present version asked, until ctx ends.
func (r *runner) syncChecks(ctx context.Context) {
	r.mu.Lock()
	g, job, alloc := r.group(), r.job, r.alloc
	r.mu.Unlock()
	if g == nil {
		return
	}
	c := &r.checks
	c.mu.Lock()
	defer c.mu.Unlock()
	wanted := map[string]bool{}
	for _, s := range g.AllServices() {
		for _, spec := range s.Checks {
			id := cluster.CheckID(alloc, s, spec)
			wanted[id] = true
			if old := c.running[id]; old != nil {
				if reflect.DeepEqual(old.spec, spec) {
					continue
				}
				old.stop()
			}
			if c.running == nil {
				c.running, c.results = map[string]*checking{}, map[string]*checkResult{}
			}
			inside, stop := context.WithCancel(ctx)
			c.running[id] = &checking{spec, stop}
			res := &checkResult{
				ID: id, Mode: modeHealthiness, Status: checkPending, Output: "nomad: waiting to run", Timestamp: time.Now().Unix(),
				Group: alloc.Name, Task: s.TaskName, Service: s.Expand(s.Name, job, alloc), Check: s.Expand(spec.Name, job, alloc),
			}
			if spec.OnUpdate == cluster.OnUpdateIgnore {
				res.Mode = modeReadiness
			}
			c.results[id] = res
			c.wg.Go(func() { r.keepChecking(inside, s, spec, res) })
		}
	}
	for id, old := range c.running {
		if !wanted[id] {
			old.stop()
			delete(c.running, id)
			delete(c.results, id)
		}
	}
}

// keepChecking asks one check, at once and then in its interval, while there is somebody to ask.
func (r *runner) keepChecking(ctx context.Context, s *cluster.Service, spec *cluster.ServiceCheck, res *checkResult) {
	r.mu.Lock()
	question := r.question(s, spec)
	r.mu.Unlock()
	for {
		wait := checkIdle
		if since, up := r.upSince(s.TaskName); up {
			wait = spec.Interval
			status, code, output := question.ask(ctx)
			if ctx.Err() != nil {
				return
			}
			if _, still := r.upSince(s.TaskName); still { // else it was asked while it ended
				r.checked(spec, res, since, status, code, output)
			}
		} else {
			r.checked(spec, res, since, checkPending, 0, "nomad: the task does not run")
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
	}
}

// upSince says since when a task runs, or, without a name, the last of the group's main tasks that do.
func (r *runner) upSince(name string) (since time.Time, up bool) {
	select {
	case <-r.stop:
		return since, false
	default:
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, t := range r.group().Tasks {
		if name != "" && t.Name != name || name == "" && t.Lifecycle.Once() {
			continue
		}
		if l := r.local.Tasks[t.Name]; l != nil && l.State.State == cluster.TaskStateRunning {
			up = true
			if at := l.State.StartedAt.Std(); at.After(since) {
				since = at
			}
		}
	}
	return since, up
}

// checked takes an answer, and restarts the task when there were too many bad ones.
func (r *runner) checked(spec *cluster.ServiceCheck, res *checkResult, since time.Time, status string, code int, output string) {
	now := time.Now()
	r.checks.mu.Lock()
	turned := res.Status != status
	if status == checkSuccess && turned {
		res.passing = now
	}
	if status != checkSuccess {
		res.passing = time.Time{}
	}
	if status != checkPending || turned {
		res.Status, res.StatusCode, res.Output, res.Timestamp = status, code, output, now.Unix()
	}
	restart := false
	switch cr := spec.CheckRestart; {
	case status != checkFailure || cr == nil:
		res.failures = 0
	case now.Sub(since) >= cr.Grace:
		if res.failures++; res.failures >= cr.Limit {
			res.failures, restart = 0, true
		}
	}
	r.checks.mu.Unlock()
	if turned {
		if status != checkPending {
			r.log.Info("service check", "service", res.Service, "check", res.Check, "status", status, "output", output)
		}
		r.look()
	}
	if t := r.tasks[spec.TaskName]; restart && t != nil {
		t.restartUnwell(fmt.Sprintf("healthcheck: check %q unhealthy", res.Check))
	}
}

// checksSince says since when all checks succeed that an update waits for, and what service has one that does not.
func (r *runner) checksSince() (since time.Time, waiting string) {
	r.checks.mu.Lock()
	defer r.checks.mu.Unlock()
	for _, id := range slices.Sorted(maps.Keys(r.checks.results)) {
		switch c := r.checks.results[id]; {
		case c.Mode == modeReadiness:
		case c.passing.IsZero():
			return since, c.Service
		case c.passing.After(since):
			since = c.passing
		}
	}
	return since, ""
}

// checkResults are the latest answers, by ID.
func (a *Agent) checkResults(allocID string) (map[string]checkResult, error) {
	r, err := a.known(allocID)
	if err != nil {
		return nil, err
	}
	r.checks.mu.Lock()
	defer r.checks.mu.Unlock()
	out := map[string]checkResult{}
	for id, c := range r.checks.results {
		out[id] = *c
	}
	return out, nil
}

// question is a check with all that it needs of the allocation.
type question struct {
	*cluster.ServiceCheck
	address string // host:port
	lacks   string // why it cannot be asked
	client  *http.Client
	request func(ctx context.Context) (*http.Request, error)
}

// question prepares a check. Caller holds mu.
func (r *runner) question(s *cluster.Service, spec *cluster.ServiceCheck) *question {
	job, alloc := r.job, r.alloc
	label := spec.PortLabel
	if label == "" {
		label = s.PortLabel
	}
	host, port := alloc.Port(label, r.a.cfg.Address)
	if s.Address != "" {
		host = s.Expand(s.Address, job, alloc)
	}
	q := &question{ServiceCheck: spec, address: net.JoinHostPort(host, strconv.Itoa(port))}
	if port == 0 {
		q.lacks = fmt.Sprintf("the allocation has no port %q", label)
		return q
	}
	if spec.Type != cluster.CheckHTTP {
		return q
	}
	q.client = &http.Client{Timeout: spec.Timeout, Transport: &http.Transport{
		DisableKeepAlives: true,
		TLSClientConfig:   &tls.Config{ServerName: spec.TLSServerName, InsecureSkipVerify: spec.TLSSkipVerify}, //nolint:gosec // the job says so
	}}
	url, body := spec.Protocol+"://"+q.address+s.Expand(spec.Path, job, alloc), s.Expand(spec.Body, job, alloc)
	q.request = func(ctx context.Context) (*http.Request, error) {
		req, err := http.NewRequestWithContext(ctx, spec.Method, url, strings.NewReader(body))
		if err != nil {
			return nil, err
		}
		req.Header.Set("User-Agent", "rxvision-check")
		for name, values := range spec.Header {
			for _, v := range values {
				v = s.Expand(v, job, alloc)
				if strings.EqualFold(name, "host") {
					req.Host = v
				}
				req.Header.Add(name, v)
			}
		}
		return req, nil
	}
	return q
}

// ask asks once: TCP succeeds when the port takes a connection, HTTP when the status of the answer is one of 200 to 299.
func (q *question) ask(ctx context.Context) (status string, code int, output string) {
	if q.lacks != "" {
		return checkFailure, 0, q.lacks
	}
	if q.Type == cluster.CheckTCP {
		conn, err := (&net.Dialer{Timeout: q.Timeout}).DialContext(ctx, "tcp", q.address)
		if err != nil {
			return checkFailure, 0, err.Error()
		}
		_ = conn.Close()
		return checkSuccess, 0, "nomad: tcp ok"
	}
	req, err := q.request(ctx)
	if err != nil {
		return checkFailure, 0, err.Error()
	}
	resp, err := q.client.Do(req)
	if err != nil {
		return checkFailure, 0, err.Error()
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(resp.Body, checkOutput))
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return checkFailure, resp.StatusCode, strings.ToValidUTF8(string(text), "�")
	}
	return checkSuccess, resp.StatusCode, "nomad: http ok"
}
