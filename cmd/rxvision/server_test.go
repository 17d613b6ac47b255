package main

import (
	"strings"
	"testing"
)

// TestServerTellsAllFaults makes one mistake in each setting that is checked.
func TestServerTellsAllFaults(t *testing.T) {
	cmd := newServer()
	args := []string{
		"--bootstrap-expect", "4", "--region", "no/region", "--retry-join", "s1", "--http-addr", "0.0.0.0:7646",
		"--raft-advertise", "nonsense", "--node-gc-threshold", "0s", "--tls-cert", "s1.pem",
	}
	if err := cmd.ParseFlags(args); err != nil {
		t.Fatal(err)
	}
	err := cmd.RunE(cmd, nil)
	if err == nil {
		t.Fatal("a server with every setting wrong started")
	}
	for _, want := range []string{
		"--bootstrap-expect 4", "--region", `--retry-join "s1"`, "--http-advertise is needed", `--raft-advertise "nonsense"`,
		"gc", "--tls-ca is needed", "--tls-key is needed", "--node-ca-cert is needed", "--node-ca-key is needed",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("not told: %s", want)
		}
	}
	if strings.Contains(err.Error(), "--tls-cert is needed") {
		t.Error("--tls-cert was given")
	}
	if t.Failed() {
		t.Log(err)
	}
}

// TestPlainServerStaysOnLoopback holds --dev to addresses of this machine.
func TestPlainServerStaysOnLoopback(t *testing.T) {
	cmd := newServer()
	if err := cmd.ParseFlags([]string{"--dev", "--rpc-addr", "10.0.0.1:7647"}); err != nil {
		t.Fatal(err)
	}
	if err := cmd.RunE(cmd, nil); err == nil || !strings.Contains(err.Error(), "--rpc-addr") {
		t.Errorf("a plain server on 10.0.0.1: %v", err)
	}
}
