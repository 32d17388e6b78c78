// Package tracewriter writes what an engine computes as a trace for crossval (docs/trace-format.md).
//
//	model := tracewriter.Model{SHA256: digest, NLayers: 4, NHeads: 4, NKVHeads: 2, HeadDim: 64, Dim: 256,
//		HiddenDim: 640, VocabSize: 1024}
//	trace, err := tracewriter.Create("my-trace", "my engine", model, prompt)
//	trace.State("version", "1.2")                            // and source_commit, compiler, flags
//	trace.BeginPass(prompt)                                  // the prompt; then one pass per decoded token
//	trace.Tap(-1, "inp_embd", x, len(prompt), 256)           // layer -1: of the whole model
//	trace.Tap(0, "q", q, len(prompt), 4, 64)                 // blk.0.q
//	trace.TapFrom(len(prompt)-1, -1, "result_output", logits, 1, 1024) // the last token only
//	trace.EndPass()
//	err = trace.Close()
//
// Call Tap when a tensor has been computed, before its buffer is reused or changed in place. One pass is in memory
// at a time. trace.json comes last: without it the directory is not a trace. The first error stays: later calls do
// nothing, so it is enough to check Close, which then writes no trace.json.
package tracewriter

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
)

// Model states the digest of the GGUF file (64 lower-case hexadecimal digits) and the model's shape.
type Model struct {
	SHA256    string `json:"sha256"`
	NLayers   int    `json:"n_layers"`
	NHeads    int    `json:"n_heads"`
	NKVHeads  int    `json:"n_kv_heads"`
	HeadDim   int    `json:"head_dim"`
	Dim       int    `json:"dim"`
	HiddenDim int    `json:"hidden_dim"`
	VocabSize int    `json:"vocab_size"`
}

type tap struct {
	Name  string `json:"name"`
	DType string `json:"dtype"`
	Shape []int  `json:"shape"`
	Rows  []int  `json:"rows,omitempty"`
}

type pass struct {
	Kind     string  `json:"kind"`
	Start    int     `json:"start"`
	TokenIDs []int32 `json:"token_ids"`
	File     string  `json:"file"`
	SHA256   string  `json:"sha256"`
	Taps     []tap   `json:"taps"`
}

// Writer is a trace being written.
type Writer struct {
	directory string
	engine    map[string]string
	model     Model
	prompt    []int32
	passes    []pass
	nTokens   int
	pass      *pass
	data      bytes.Buffer
	header    map[string]any
	err       error
}

// Create makes the directory, which must not exist; engine, model and the first token ids are stated in the trace.
func Create(directory, engine string, model Model, promptIDs []int32) (*Writer, error) {
	if len(promptIDs) == 0 {
		return nil, fmt.Errorf("the prompt has no tokens")
	}
	named := map[string]string{"name": engine}
	return &Writer{directory: directory, engine: named, model: model, prompt: promptIDs}, os.Mkdir(directory, 0o777)
}

// State states a fact of the build: "version", "source_commit", "compiler" or "flags".
func (w *Writer) State(fact, value string) { w.engine[fact] = value }

func (w *Writer) check(good bool, why string) bool {
	if w.err == nil && !good {
		w.err = fmt.Errorf("%s", why)
	}
	return w.err == nil
}

// BeginPass begins one call of the engine, with the tokens that follow those of the passes before it.
func (w *Writer) BeginPass(tokenIDs []int32) {
	if !w.check(w.pass == nil && len(tokenIDs) > 0, "a pass begins inside another, or has no tokens") {
		return
	}
	kind := "prefill"
	if w.nTokens > 0 && len(tokenIDs) == 1 {
		kind = "decode"
	}
	w.pass = &pass{Kind: kind, Start: w.nTokens, TokenIDs: append([]int32{}, tokenIDs...)}
	w.pass.File = fmt.Sprintf("pass-%04d.safetensors", len(w.passes))
	w.header = map[string]any{}
	w.data.Reset()
}

// Tap writes one tensor of all tokens of the pass; its shape is in docs/trace-format.md.
func (w *Writer) Tap(layer int, name string, data []float32, shape ...int) {
	w.TapFrom(0, layer, name, data, shape...)
}

// TapFrom writes one tensor of the tokens from first (0: the pass's first) to the last of the pass.
func (w *Writer) TapFrom(first, layer int, name string, data []float32, shape ...int) {
	count := 1
	for _, size := range shape {
		count *= size
	}
	if layer >= 0 {
		name = fmt.Sprintf("blk.%d.%s", layer, name)
	}
	if !w.check(w.pass != nil, name+" outside a pass") {
		return
	}
	if !w.check(len(data) > 0 && count == len(data) && first < len(w.pass.TokenIDs), name+" does not fit its shape") {
		return
	}
	made := tap{Name: name, DType: "F32", Shape: shape}
	for row := first; first > 0 && row < len(w.pass.TokenIDs); row++ {
		made.Rows = append(made.Rows, row)
	}
	start := w.data.Len()
	w.check(binary.Write(&w.data, binary.LittleEndian, data) == nil, name+" cannot be encoded")
	offsets := []int{start, w.data.Len()}
	w.header[fmt.Sprintf("p%d.%s", len(w.passes), name)] = map[string]any{
		"dtype": "F32", "shape": shape, "data_offsets": offsets,
	}
	w.pass.Taps = append(w.pass.Taps, made)
}

// EndPass writes the pass file.
func (w *Writer) EndPass() {
	if !w.check(w.pass != nil && len(w.pass.Taps) > 0, "a pass ends that has no taps, or did not begin") {
		return
	}
	header, err := json.Marshal(w.header)
	file := binary.LittleEndian.AppendUint64(nil, uint64(len(header)))
	file = append(append(file, header...), w.data.Bytes()...)
	digest := sha256.Sum256(file)
	w.pass.SHA256 = hex.EncodeToString(digest[:])
	if err == nil {
		err = os.WriteFile(filepath.Join(w.directory, w.pass.File), file, 0o666)
	}
	w.nTokens += len(w.pass.TokenIDs)
	w.passes, w.pass, w.err = append(w.passes, *w.pass), nil, err
}

// Close writes trace.json, which makes the directory a trace, unless a call has failed; it returns the first error.
func (w *Writer) Close() error {
	if !w.check(w.pass == nil && len(w.passes) > 0, "closed inside a pass, or before the first") {
		return w.err
	}
	text, err := json.MarshalIndent(map[string]any{
		"format": "crossval-trace", "format_version": 1, "engine": w.engine,
		"model": w.model, "prompt": map[string]any{"token_ids": w.prompt}, "passes": w.passes,
	}, "", " ")
	part := filepath.Join(w.directory, "trace.json.part")
	if err == nil {
		err = os.WriteFile(part, text, 0o666)
	}
	if err == nil {
		err = os.Rename(part, filepath.Join(w.directory, "trace.json"))
	}
	return err
}
