package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/rxvision/rxvision/proc"
)

// The peer: three real nomad servers with real data folders and their defaults.
const (
	nomadPeer   = "nomad 1.11.1, 3 servers, TLS and ACL off"
	nomadTrials = 10 // failovers: each takes seconds
)

type nomads struct {
	dir, path string
	servers   []*nomadServer
	client    *http.Client
}

type nomadServer struct {
	name, config, base, rpc string
	proc                    *proc.Process
}

// startNomads starts them and waits until they have a leader.
func startNomads(ctx context.Context, c controlFlags, dir string) (_ *nomads, err error) {
	path, err := filepath.Abs(c.nomad)
	if err != nil {
		return nil, err
	}
	n := &nomads{dir: dir, path: path, client: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 128}}}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.stop(context.WithoutCancel(ctx)))
		}
	}()
	const count = 3
	var ports [count][3]string // http, rpc, serf
	var join []string
	for i := range ports {
		for k := range ports[i] {
			addr, err := freeLoopback()
			if err != nil {
				return nil, err
			}
			_, ports[i][k], _ = net.SplitHostPort(addr) // it is one
		}
		join = append(join, strconv.Quote("127.0.0.1:"+ports[i][2]))
	}
	for i := range ports {
		name := fmt.Sprintf("nomad%d", i+1)
		s := &nomadServer{name: name, config: filepath.Join(dir, name+".hcl"), base: "http://127.0.0.1:" + ports[i][0], rpc: "127.0.0.1:" + ports[i][1]}
		text := fmt.Sprintf("name = %q\ndata_dir = %q\nbind_addr = \"127.0.0.1\"\nlog_level = \"WARN\"\nadvertise {\n  http = \"127.0.0.1\"\n  rpc = \"127.0.0.1\"\n  serf = \"127.0.0.1\"\n}\nports {\n  http = %s\n  rpc = %s\n  serf = %s\n}\nserver {\n  enabled = true\n  bootstrap_expect = %d\n  server_join {\n    retry_join = [%s]\n    retry_interval = \"1s\"\n  }\n}\nlimits {\n  http_max_conns_per_client = 0\n  rpc_max_conns_per_client = 0\n}\n",
			name, filepath.Join(dir, name), ports[i][0], ports[i][1], ports[i][2], count, strings.Join(join, ", "))
		if err := os.WriteFile(s.config, []byte(text), 0o600); err != nil {
			return nil, err
		}
		if err := n.start(s); err != nil {
			return nil, err
		}
		n.servers = append(n.servers, s)
	}
	_, err = n.leader(ctx)
	return n, err
}

func (n *nomads) start(s *nomadServer) (err error) {
	logs := proc.LogFiles{Dir: n.dir, Name: s.name}
	s.proc, err = proc.Start(proc.Spec{
		Path: n.path, Args: []string{"agent", "-config", s.config}, Env: os.Environ(), Dir: n.dir, Stdout: logs, Stderr: logs,
		StatusFile: filepath.Join(n.dir, s.name+".status"), DieWithParent: true,
	})
	return err
}

func (n *nomads) stop(ctx context.Context) error {
	n.client.CloseIdleConnections()
	var faults []error
	for _, s := range n.servers {
		if s.proc != nil {
			_, err := s.proc.Stop(ctx, syscall.SIGINT, 10*time.Second)
			s.proc.Detach()
			s.proc = nil
			faults = append(faults, err)
		}
	}
	return errors.Join(faults...)
}

// leader waits until every server names the same one.
func (n *nomads) leader(ctx context.Context) (*nomadServer, error) {
	for {
		votes := map[string]int{}
		for _, s := range n.servers {
			if answer, err := httpGet(ctx, s.base+"/v1/status/leader"); err == nil {
				votes[strings.Trim(string(answer), "\"\n")]++
			}
		}
		for _, s := range n.servers {
			if votes[s.rpc] == len(n.servers) {
				return s, nil
			}
		}
		if err := pause(ctx); err != nil {
			return nil, fmt.Errorf("wait for a leader of nomad: %w", err)
		}
	}
}

// put registers a job at a server.
func (n *nomads) put(ctx context.Context, s *nomadServer, body string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, s.base+"/v1/jobs", strings.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := n.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", resp.Status, answer)
	}
	return err
}

// nomadWrites measures accepted registrations as benchWrites does.
func nomadWrites(ctx context.Context, c controlFlags, dir string) (_ map[int]sample, err error) {
	n, err := startNomads(ctx, c, dir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, n.stop(context.WithoutCancel(ctx))) }()
	return registrations(ctx, c.each, "nowhere", func(ctx context.Context, i int, body string) error {
		return n.put(ctx, n.servers[i%len(n.servers)], body)
	})
}

// nomadFailovers measures kill -9 of nomad's leader as benchFailover does.
func nomadFailovers(ctx context.Context, c controlFlags, dir string, out io.Writer) (_ []time.Duration, err error) {
	n, err := startNomads(ctx, c, dir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, n.stop(context.WithoutCancel(ctx))) }()
	return failovers(ctx, min(c.trials, nomadTrials), out, func(ctx context.Context) (time.Duration, error) {
		dead, err := n.leader(ctx)
		if err != nil {
			return 0, err
		}
		began := time.Now()
		if err := dead.proc.Signal(syscall.SIGKILL); err != nil {
			return 0, err
		}
		_, err = dead.proc.Wait(ctx)
		dead.proc.Detach()
		dead.proc = nil
		if err != nil {
			return 0, err
		}
		body := benchJob(fmt.Sprintf("failover-%d", serials.Add(1)), 1, "nowhere")
		var survivors []func(context.Context) error
		for _, s := range n.servers {
			if s != dead {
				survivors = append(survivors, func(ctx context.Context) error { return n.put(ctx, s, body) })
			}
		}
		took, err := firstAccepted(ctx, began, survivors)
		if err != nil {
			return 0, err
		}
		if err := n.start(dead); err != nil {
			return 0, err
		}
		return took, n.healthy(ctx)
	})
}

// healthy waits until nomad calls all its servers healthy voters.
func (n *nomads) healthy(ctx context.Context) error {
	for {
		if leader, err := n.leader(ctx); err != nil {
			return err
		} else if answer, err := httpGet(ctx, leader.base+"/v1/operator/autopilot/health"); err == nil && strings.Contains(string(answer), `"FailureTolerance":1`) {
			return nil
		}
		if err := pause(ctx); err != nil {
			return fmt.Errorf("wait for nomad's servers to be healthy: %w", err)
		}
	}
}
