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
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/rxvision/rxvision/proc"
)

// peer is another control plane on three servers, to measure beside this one: real
// processes with real data folders and their defaults, TLS and ACL off.
type peer struct {
	name, path string
	args       []string // in front of the configuration file
	// config writes a server's configuration: its name, folder, ports (HTTP, RPC,
	// serf and one more) and what to join.
	config func(name, dir string, ports [4]string, join string) string
	// write makes the request of one durable write, the job of benchJob or as many bytes.
	write func(id, job string) (path, body string)

	dir     string
	servers []*peerServer
	client  *http.Client
}

type peerServer struct {
	name, config, base, rpc string
	proc                    *proc.Process
}

const (
	peerServers = 3
	peerTrials  = 10 // failovers: each takes seconds
)

// peers gives those whose binaries are there.
func (c *controlFlags) peers() []*peer {
	var out []*peer
	if c.nomad != "" {
		out = append(out, &peer{
			name: "nomad, TLS and ACL off", path: c.nomad, args: []string{"agent", "-config"},
			config: func(name, dir string, ports [4]string, join string) string {
				return fmt.Sprintf("name = %q\ndata_dir = %q\nbind_addr = \"127.0.0.1\"\nlog_level = \"WARN\"\nadvertise {\n  http = \"127.0.0.1\"\n  rpc = \"127.0.0.1\"\n  serf = \"127.0.0.1\"\n}\nports {\n  http = %s\n  rpc = %s\n  serf = %s\n}\nserver {\n  enabled = true\n  bootstrap_expect = %d\n  server_join {\n    retry_join = [%s]\n    retry_interval = \"1s\"\n  }\n}\nlimits {\n  http_max_conns_per_client = 0\n  rpc_max_conns_per_client = 0\n}\n",
					name, dir, ports[0], ports[1], ports[2], peerServers, join)
			},
			write: func(_, job string) (string, string) { return "/v1/jobs", job },
		})
	}
	if c.consul != "" {
		out = append(out, &peer{
			name: "consul KV, values of the same size, TLS and ACL off", path: c.consul, args: []string{"agent", "-config-file"},
			config: func(name, dir string, ports [4]string, join string) string {
				return fmt.Sprintf("node_name = %q\ndata_dir = %q\nbind_addr = \"127.0.0.1\"\nlog_level = \"WARN\"\nports {\n  http = %s\n  server = %s\n  serf_lan = %s\n  serf_wan = -1\n  dns = -1\n  grpc_tls = %s\n}\nserver = true\nbootstrap_expect = %d\nretry_join = [%s]\nretry_interval = \"1s\"\nlimits {\n  http_max_conns_per_client = 1000\n  rpc_max_conns_per_client = 1000\n}\n",
					name, dir, ports[0], ports[1], ports[2], ports[3], peerServers, join)
			},
			write: func(id, job string) (string, string) { return "/v1/kv/" + id, job },
		})
	}
	return out
}

// begin starts its servers in a folder and waits until they have a leader.
func (n *peer) begin(ctx context.Context, dir string) (err error) {
	if n.path, err = filepath.Abs(n.path); err != nil {
		return err
	}
	n.dir, n.client = dir, &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 128}}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.stop(context.WithoutCancel(ctx)))
		}
	}()
	var ports [peerServers][4]string
	var join []string
	for i := range ports {
		for k := range ports[i] {
			addr, err := freeLoopback()
			if err != nil {
				return err
			}
			_, ports[i][k], _ = net.SplitHostPort(addr) // it is one
		}
		join = append(join, strconv.Quote("127.0.0.1:"+ports[i][2]))
	}
	for i := range ports {
		name := fmt.Sprintf("%s%d", filepath.Base(n.path), i+1)
		s := &peerServer{name: name, config: filepath.Join(dir, name+".hcl"), base: "http://127.0.0.1:" + ports[i][0], rpc: "127.0.0.1:" + ports[i][1]}
		text := n.config(name, filepath.Join(dir, name), ports[i], strings.Join(join, ", "))
		if err := os.WriteFile(s.config, []byte(text), 0o600); err != nil {
			return err
		}
		if err := n.start(s); err != nil {
			return err
		}
		n.servers = append(n.servers, s)
	}
	_, err = n.leader(ctx)
	return err
}

func (n *peer) start(s *peerServer) (err error) {
	logs := proc.LogFiles{Dir: n.dir, Name: s.name}
	s.proc, err = proc.Start(proc.Spec{
		Path: n.path, Args: append(slices.Clone(n.args), s.config), Env: os.Environ(), Dir: n.dir, Stdout: logs, Stderr: logs,
		StatusFile: filepath.Join(n.dir, s.name+".status"), DieWithParent: true,
	})
	return err
}

func (n *peer) stop(ctx context.Context) error {
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
func (n *peer) leader(ctx context.Context) (*peerServer, error) {
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
			return nil, fmt.Errorf("wait for a leader of %s: %w", n.name, err)
		}
	}
}

// put makes one durable write at a server.
func (n *peer) put(ctx context.Context, s *peerServer, id, job string) error {
	path, body := n.write(id, job)
	return requestOnce(ctx, n.client, http.MethodPut, s.base+path, http.Header{}, []byte(body))
}

// writes measures accepted writes as benchWrites does.
func (n *peer) writes(ctx context.Context, each time.Duration, dir string) (_ map[int]sample, err error) {
	if err := n.begin(ctx, dir); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, n.stop(context.WithoutCancel(ctx))) }()
	return registrations(ctx, each, "nowhere", func(ctx context.Context, i int, id, job string) error {
		return n.put(ctx, n.servers[i%len(n.servers)], id, job)
	})
}

// failovers measures kill -9 of the leader as benchFailover does.
func (n *peer) failovers(ctx context.Context, trials int, dir string, out io.Writer) (_ []time.Duration, err error) {
	if err := n.begin(ctx, dir); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, n.stop(context.WithoutCancel(ctx))) }()
	return failovers(ctx, min(trials, peerTrials), out, func(ctx context.Context) (time.Duration, error) {
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
		id := fmt.Sprintf("failover-%d", serials.Add(1))
		job := benchJob(id, 1, "nowhere")
		var survivors []func(context.Context) error
		for _, s := range n.servers {
			if s != dead {
				survivors = append(survivors, func(ctx context.Context) error { return n.put(ctx, s, id, job) })
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

// healthy waits until the leader calls all its servers healthy voters.
func (n *peer) healthy(ctx context.Context) error {
	for {
		if leader, err := n.leader(ctx); err != nil {
			return err
		} else if answer, err := httpGet(ctx, leader.base+"/v1/operator/autopilot/health"); err == nil && strings.Contains(string(answer), `"FailureTolerance":1`) {
			return nil
		}
		if err := pause(ctx); err != nil {
			return fmt.Errorf("wait for %s's servers to be healthy: %w", n.name, err)
		}
	}
}
