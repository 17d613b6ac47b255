package agent

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/rxvision/rxvision/agent/task"
	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/pki"
)

// How a model server's readiness is probed.
const (
	probePath     = "/v2/health/ready"
	probeStarting = 100 * time.Millisecond // between probes until it is ready
	probeInterval = time.Second            // … and then
	probeTimeout  = 2 * time.Second
	probeFailures = 3 // in a row that make a ready server not ready
	probeBody     = 4 << 10
)

// probe keeps the allocation's Serving true to what the server of a run says, until
// ctx ends.
func (t *taskRunner) probe(ctx context.Context, run task.State) {
	address := run.Address
	_, _, _, spec := t.r.spec(t.name)
	if spec.Model == nil {
		return
	}
	serving := cluster.Serving{Task: t.name, Model: spec.Model.Name, Version: spec.Model.Version, Address: address}
	set := func(ready bool) {
		s := serving
		s.Ready = ready
		t.setServing(&s)
	}
	// After a restart of the agent a model counts as ready until it fails probes, so that requests flow on.
	was := t.served()
	ready := was != nil && was.Ready && was.Address == address
	set(ready)
	transport, scheme := &http.Transport{DisableKeepAlives: true}, "http"
	if run.TLS && t.r.a.holder != nil {
		scheme = "https"
		transport.TLSClientConfig = t.r.a.holder.Material().Client(pki.Exactly(pki.RoleWorker, t.r.id))
	}
	client := &http.Client{Timeout: probeTimeout, Transport: transport}
	failures := 0
	for {
		ok := probeOnce(ctx, client, scheme+"://"+address+probePath)
		if ok {
			failures = 0
		}
		switch {
		case ctx.Err() != nil:
			return
		case ok && !ready:
			ready = true
			t.log.Info("model is ready", "model", serving.Model, "version", serving.Version, "address", address)
			t.event(messageEvent(eventDriver, fmt.Sprintf("Model %s version %d is ready at %s", serving.Model, serving.Version, address)))
			set(true)
		case ready && !ok:
			if failures++; failures >= probeFailures {
				ready, failures = false, 0
				t.log.Warn("model is not ready any more", "model", serving.Model, "version", serving.Version, "address", address)
				t.event(messageEvent(eventDriver, fmt.Sprintf("Model %s version %d does not answer as ready", serving.Model, serving.Version)))
				set(false)
			}
		}
		wait := probeStarting
		if ready {
			wait = probeInterval
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
	}
}

// setServing changes where the task's model is to be had. Once the allocation is to
// end there is no such place any more.
func (t *taskRunner) setServing(s *cluster.Serving) {
	select {
	case <-t.r.stop:
		s = nil
	default:
	}
	old := t.served()
	if old == s || old != nil && s != nil && *old == *s {
		return
	}
	t.update(func(l *localTask) {
		switch {
		case s == nil || !s.Ready:
			l.Ready = 0
		case l.Ready == 0:
			l.Ready = cluster.TimeOf(time.Now())
		}
		l.Serving = s
	})
}

// served is what the servers were last told of the task's model.
func (t *taskRunner) served() *cluster.Serving {
	t.r.mu.Lock()
	defer t.r.mu.Unlock()
	return t.local().Serving
}

func probeOnce(ctx context.Context, client *http.Client, url string) bool {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return false
	}
	resp, err := client.Do(req)
	if err != nil {
		return false
	}
	defer resp.Body.Close()
	_, _ = io.CopyN(io.Discard, resp.Body, probeBody)
	return resp.StatusCode == http.StatusOK
}
